//! Where objects come from: Kubernetes manifests, or a Kubernetes API server.
//!
//! Both sources turn what they read into the slim types of [`crate::object`] by the same rules
//! ([`convert`]) and send only differences. What cannot be served is logged once, as one line, for
//! as long as it stays so.

mod allocate;
pub mod convert;
pub(crate) mod files;
pub mod kinds;
pub mod kubernetes;
mod left_out;
pub mod manifests;
pub mod queue;
mod yaml;
