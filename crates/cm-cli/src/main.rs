//! The command `cm`: train, sample and inspect consistency models.

mod pictures;

fn main() {}
