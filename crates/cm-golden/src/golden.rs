//! One golden file, and the set of all that were given.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;

use cm_model::{Bundle, TensorMap};
use serde::de::DeserializeOwned;
use tch::{Kind, Tensor};

use crate::close::values;

/// Why a file cannot be checked: one line for the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem(pub String);

/// Result of reading a golden file or of running what it asks for.
pub type Result<T> = std::result::Result<T, Problem>;

impl<E: std::error::Error> From<E> for Problem {
    fn from(error: E) -> Self {
        Problem(error.to_string())
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes a [`Problem`] of a message.
pub fn problem<T>(message: impl Into<String>) -> Result<T> {
    Err(Problem(message.into()))
}

/// What became of a tensor of a golden file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It went into a computation.
    Input,
    /// A result was compared with it.
    Checked,
    /// It needs no match, for the reason given.
    Information(&'static str),
}

/// A golden file: recorded inputs and results, and how they came about.
///
/// Every access says what the tensor is used for, so that in the end no tensor is left unused by accident.
#[derive(Debug)]
pub struct Golden {
    /// The file's name without its ending.
    pub stem: String,
    tensors: TensorMap,
    metadata: BTreeMap<String, String>,
    uses: RefCell<BTreeMap<String, Use>>,
}

impl Golden {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Problem`] if it is not a whole safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        let Bundle { tensors, metadata } = Bundle::read(path)?;
        Ok(Self { stem: stem(path), tensors, metadata, uses: RefCell::default() })
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The parts of the names behind `prefix`.
    pub fn names_after<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.names().filter_map(move |name| name.strip_prefix(prefix))
    }

    /// Whether a tensor is in the file.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor that goes into a computation.
    ///
    /// # Errors
    /// [`Problem`] if the file does not have it.
    pub fn input(&self, name: &str) -> Result<Tensor> {
        self.take(name, Use::Input)
    }

    /// A tensor that a result is about to be compared with.
    ///
    /// # Errors
    /// [`Problem`] if the file does not have it.
    pub fn want(&self, name: &str) -> Result<Tensor> {
        self.take(name, Use::Checked)
    }

    /// An input as f64 values, row-major.
    ///
    /// # Errors
    /// [`Problem`] if the file does not have it.
    pub fn input_values(&self, name: &str) -> Result<Vec<f64>> {
        Ok(values(&self.input(name)?))
    }

    /// An input of integers.
    ///
    /// # Errors
    /// [`Problem`] if the file does not have it or if it holds no integers.
    pub fn input_integers(&self, name: &str) -> Result<Vec<i64>> {
        let tensor = self.input(name)?;
        if tensor.kind() != Kind::Int64 {
            return problem(format!("tensor '{name}' has dtype {:?}, expected Int64", tensor.kind()));
        }
        Ok(Vec::try_from(tensor.view([-1]))?)
    }

    /// Says that a tensor needs no match, and why.
    pub fn information(&self, name: &str, reason: &'static str) {
        if self.has(name) {
            self.uses.borrow_mut().entry(name.into()).or_insert(Use::Information(reason));
        }
    }

    /// All weights `state.<key>`, by key.
    pub fn state(&self) -> TensorMap {
        self.state_under("state.")
    }

    /// All tensors `<prefix><key>`, by key, as inputs.
    pub fn state_under(&self, prefix: &str) -> TensorMap {
        let found = self.tensors.iter().filter_map(|(name, tensor)| {
            let key = name.strip_prefix(prefix)?;
            self.mark(name, Use::Input);
            Some((key.to_owned(), tensor.shallow_clone()))
        });
        found.collect()
    }

    /// Tensors that nothing used, sorted.
    pub fn unused(&self) -> Vec<String> {
        let uses = self.uses.borrow();
        self.names().filter(|name| !uses.contains_key(*name)).map(String::from).collect()
    }

    /// Whether anything was compared with a tensor of this file.
    pub fn any_checked(&self) -> bool {
        self.uses.borrow().values().any(|u| *u == Use::Checked)
    }

    /// A metadata text, if the file has it.
    pub fn meta_text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A metadata value.
    ///
    /// # Errors
    /// [`Problem`] if it is missing or does not parse.
    pub fn meta<T: FromStr>(&self, key: &str) -> Result<T> {
        let text = self.required(key)?;
        text.parse().map_err(|_| Problem(format!("metadata '{key}' is '{text}'")))
    }

    /// A metadata value that may be missing.
    ///
    /// # Errors
    /// [`Problem`] if it is there and does not parse.
    pub fn meta_or<T: FromStr>(&self, key: &str, default: T) -> Result<T> {
        if self.metadata.contains_key(key) { self.meta(key) } else { Ok(default) }
    }

    /// A metadata value that is JSON.
    ///
    /// # Errors
    /// [`Problem`] if it is missing or is not what `T` expects.
    pub fn meta_json<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let text = self.required(key)?;
        serde_json::from_str(text).map_err(|e| Problem(format!("metadata '{key}': {e} in '{text}'")))
    }

    /// The number that follows `phrase` in the file's own statement of its tolerance.
    ///
    /// # Errors
    /// [`Problem`] if the statement does not say.
    pub fn tolerance(&self, phrase: &str) -> Result<f64> {
        let text = self.required("tolerance")?;
        number_after(text, phrase)
            .ok_or_else(|| Problem(format!("the stated tolerance '{text}' has no number after '{phrase}'")))
    }

    fn required(&self, key: &str) -> Result<&str> {
        self.meta_text(key).ok_or_else(|| Problem(format!("metadata '{key}' is missing")))
    }

    fn take(&self, name: &str, how: Use) -> Result<Tensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| Problem(format!("tensor '{name}' is missing")))?;
        self.mark(name, how);
        Ok(tensor.shallow_clone())
    }

    fn mark(&self, name: &str, how: Use) {
        let mut uses = self.uses.borrow_mut();
        let entry = uses.entry(name.to_owned()).or_insert(how);
        if how == Use::Checked {
            *entry = how;
        }
    }
}

fn number_after(text: &str, phrase: &str) -> Option<f64> {
    let rest = text[text.find(phrase)? + phrase.len()..].trim_start_matches([' ', '<']);
    let end = rest.find(|c: char| !(c.is_ascii_digit() || "eE.+-".contains(c))).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// A file's name without folder and ending.
pub fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// All golden files of some folders. They are read when they are needed and stay in memory.
#[derive(Debug, Default)]
pub struct Library {
    paths: Vec<PathBuf>,
    open: RefCell<BTreeMap<PathBuf, Rc<Golden>>>,
    /// For each file, the files whose checks took something from it.
    users: RefCell<BTreeMap<PathBuf, Vec<String>>>,
}

impl Library {
    /// Lists the `*.safetensors` files of `folders`.
    ///
    /// # Errors
    /// [`Problem`] if a folder cannot be read or if none holds such a file.
    pub fn new(folders: &[PathBuf]) -> Result<Self> {
        let mut paths = Vec::new();
        for folder in folders {
            let entries =
                std::fs::read_dir(folder).map_err(|e| Problem(format!("{}: {e}", folder.display())))?;
            let mut found = Vec::new();
            for entry in entries {
                let path = entry?.path();
                if path.extension().is_some_and(|e| e == "safetensors") {
                    found.push(path);
                }
            }
            found.sort();
            paths.append(&mut found);
        }
        if paths.is_empty() {
            let folders: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
            return problem(format!("no *.safetensors file in {}", folders.join(", ")));
        }
        Ok(Self { paths, ..Self::default() })
    }

    /// The files, folder by folder, sorted by name.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The file at `path`.
    ///
    /// # Errors
    /// [`Problem`] if it cannot be read.
    pub fn open(&self, path: &Path) -> Result<Rc<Golden>> {
        if let Some(golden) = self.open.borrow().get(path) {
            return Ok(Rc::clone(golden));
        }
        let golden = Rc::new(Golden::read(path)?);
        self.open.borrow_mut().insert(path.to_owned(), Rc::clone(&golden));
        Ok(golden)
    }

    /// The file that `user`'s metadata names: in the same folder, or else in another of the given ones.
    ///
    /// # Errors
    /// [`Problem`] if there is no such file or it cannot be read.
    pub fn named(&self, stem_wanted: &str, user: &Path) -> Result<Rc<Golden>> {
        let mut candidates: Vec<_> = self.paths.iter().filter(|path| stem(path) == stem_wanted).collect();
        candidates.sort_by_key(|path| path.parent() != user.parent());
        let Some(path) = candidates.first() else {
            return problem(format!("it needs '{stem_wanted}.safetensors', which is in none of the folders"));
        };
        self.users.borrow_mut().entry((*path).clone()).or_default().push(stem(user));
        self.open(path)
    }

    /// The files whose checks took something from the file at `path`.
    pub fn users(&self, path: &Path) -> Vec<String> {
        self.users.borrow().get(path).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tolerances_are_read_from_the_text() {
        let text = "fp32: loss rel 1e-4; x_t2 abs 1e-5*sigma; grads rel 1e-3 of max";
        assert_eq!(number_after(text, "loss rel"), Some(1e-4));
        assert_eq!(number_after(text, "x_t2 abs"), Some(1e-5));
        assert_eq!(number_after(text, "grads rel"), Some(1e-3));
        assert_eq!(number_after(text, "ema rel"), None);
        assert_eq!(
            number_after("max abs diff / max abs < 2e-5 on F and D (allow 1e-4)", "max abs <"),
            Some(2e-5)
        );
    }
}
