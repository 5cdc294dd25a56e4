//! Many names in little memory.

use crate::error::{Error, Result};

/// Names one behind the other in one piece of memory, with the place where each ends. Three million `String`s would cost
/// three times the text; this costs four bytes a name beside it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Names {
    text: String,
    ends: Vec<u32>,
}

impl Names {
    /// Adds a name.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if all names together would take 4 GiB.
    pub fn push(&mut self, name: &str) -> Result<()> {
        let end = self.text.len() as u64 + name.len() as u64;
        let limit = u32::MAX.into();
        let too_large = |_| Error::TooLarge {
            file: name.to_owned(),
            what: "bytes of file names in one set",
            claimed: end,
            limit,
        };
        self.ends.push(u32::try_from(end).map_err(too_large)?);
        self.text.push_str(name);
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The name `index`; empty beyond the last.
    pub fn get(&self, index: usize) -> &str {
        let start =
            index.checked_sub(1).and_then(|before| self.ends.get(before)).map_or(0, |end| *end as usize);
        let end = self.ends.get(index).map_or(start, |end| *end as usize);
        self.text.get(start..end).unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|index| self.get(index))
    }

    /// The names in sorted order, each after its first `skip` bytes, with where each was before.
    pub fn sorted(self, skip: usize) -> Result<(Self, Vec<u32>)> {
        let mut order: Vec<u32> = (0..self.len() as u32).collect();
        let name = |index: &u32| self.get(*index as usize);
        if !order.is_sorted_by_key(name) {
            use rayon::slice::ParallelSliceMut;
            order.par_sort_unstable_by(|a, b| name(a).cmp(name(b)).then(a.cmp(b)));
        } else if skip == 0 {
            return Ok((self.fitted(), order));
        }
        let mut sorted =
            Self { text: String::with_capacity(self.text.len()), ends: Vec::with_capacity(self.len()) };
        for index in &order {
            sorted.push(name(index).get(skip..).unwrap_or_default())?;
        }
        Ok((sorted.fitted(), order))
    }

    /// Gives back what growing took too much.
    fn fitted(mut self) -> Self {
        self.text.shrink_to_fit();
        self.ends.shrink_to_fit();
        self
    }
}

#[cfg(test)]
impl Names {
    pub fn of(list: &[&str]) -> Self {
        let mut names = Self::default();
        list.iter().for_each(|name| names.push(name).unwrap());
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_sort() {
        let names = Names::of(&["b/2", "", "a/1", "b/10"]);
        assert_eq!(
            (names.len(), names.get(0), names.get(1), names.get(3), names.get(4)),
            (4, "b/2", "", "b/10", "")
        );
        let (sorted, order) = names.clone().sorted(0).unwrap();
        assert_eq!(sorted, Names::of(&["", "a/1", "b/10", "b/2"]));
        assert_eq!(order, [1, 2, 3, 0]);
        assert_eq!(sorted.clone().sorted(0).unwrap(), (sorted, vec![0, 1, 2, 3]));
        assert_eq!(names.sorted(2).unwrap().0, Names::of(&["", "1", "10", "2"]));
    }
}
