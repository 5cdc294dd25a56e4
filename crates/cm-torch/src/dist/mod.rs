//! Processes that train together: they meet at c10d's `TCPStore` and exchange tensors through its Gloo backend;
//! those that lie on GPUs through NCCL, once [`ProcessGroup::use_cuda`] has been called.
//!
//! Each process is a *rank* of a [`ProcessGroup`]. All ranks make the same calls in the same order; each call gives a
//! name to what is exchanged, which errors repeat. Nothing here waits for ever: ranks say once or twice a second that
//! they live, and where one ends, falls silent or calls [`ProcessGroup::fail`], the call that the others are in
//! returns [`Error::Rank`](crate::Error::Rank) with that rank and what is known of the cause.
//!
//! | what happened to a rank | when the others know |
//! | --- | --- |
//! | it failed and said so | within two seconds |
//! | it was killed, or it crashed | within about five seconds |
//! | it was stopped, or its machine or network is down | after [`Limits::silence`] |
//! | it lives and does not take part | after [`Limits::exchange`], unless it is [`busy`](ProcessGroup::busy) |
//!
//! A group of one needs no network, and its exchanges do nothing.

mod buckets;
mod cuda;
mod group;
mod hand_on;
mod rendezvous;
mod rows;
#[cfg(test)]
mod tests;
mod watch;

pub use group::{Busy, ProcessGroup};
pub use rendezvous::{Keeper, Limits, Rendezvous};
pub use rows::{Piece, Row, share_of};
