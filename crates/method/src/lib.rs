//! Describe-and-Dissect as pure functions.
