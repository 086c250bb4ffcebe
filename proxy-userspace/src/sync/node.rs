//! What the programs must know of this node: `config` and the addresses that node ports answer on.
