//! End-to-end tests through the command `cm`, one file a theme.
