//! The states of all backends at once, which the kernel copies at 280 ns each when it is asked for
//! them, and which cost a hundredth of that in shared memory.

use shunt_common::layout::BackendState;

use super::{Map, Maps, Result};
use crate::datapath::bpf::MappedArray;

/// The states of all backends, by id.
pub struct BackendStates<'m> {
    map: &'m Map<u32, BackendState>,
    /// `None`: an agent has made the map that did not let others share its memory.
    memory: Option<MappedArray<BackendState>>,
}

impl Maps {
    /// The states of all backends, to be read again and again.
    pub fn backend_states(&self) -> BackendStates<'_> {
        BackendStates {
            map: &self.backends,
            memory: self.backends.mapped(),
        }
    }
}

impl BackendStates<'_> {
    /// One more than the greatest id.
    pub fn ids(&self) -> u32 {
        self.map.capacity()
    }

    /// That of one; zeros of one that there cannot be.
    ///
    /// # Errors
    /// As [`Self::for_each`].
    pub fn get(&self, id: u32) -> Result<BackendState> {
        let state = match &self.memory {
            Some(memory) => (id < memory.len()).then(|| memory.get(id)),
            None => self.map.get(&id)?,
        };
        Ok(state.unwrap_or_default())
    }

    /// Calls `visit` with every state, also of ids that no backend has.
    ///
    /// # Errors
    /// `MapError::Kernel` when the map has to be listed and cannot: `EPERM` without `CAP_BPF`,
    /// `ENOMEM` without memory for a batch. Nothing has changed: try again.
    pub fn for_each(&self, mut visit: impl FnMut(u32, &BackendState)) -> Result<()> {
        let Some(memory) = &self.memory else {
            return self.map.for_each_batch(|ids, states| {
                for (&id, state) in ids.iter().zip(states) {
                    visit(id, state);
                }
                Ok(())
            });
        };
        for id in 0..memory.len() {
            visit(id, &memory.get(id));
        }
        Ok(())
    }
}
