//! The one kind of error that callers act on: the request is wrong (exit status 2), as against a failure while running.

use std::fmt;

/// What is wrong with a request, in words for the user: one paragraph a problem, each saying what, where and the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub problems: Vec<String>,
}

impl Refusal {
    /// A refusal with one problem, ready to be returned with `?` or `bail!`.
    pub fn error(problem: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Refusal { problems: vec![problem.into()] })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl std::error::Error for Refusal {}
