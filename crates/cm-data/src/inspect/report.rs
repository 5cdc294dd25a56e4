//! What an inspection found, as data and as text.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::formats::labels::LabelRule;
use crate::spec::{SourceKind, SourceSpec};

/// A size and how many of the images that were looked at have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SizeCount {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// 1 or 3.
    pub channels: usize,
    /// Number of images.
    pub count: usize,
}

/// A class and its images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClassCount {
    /// The class.
    pub class: usize,
    /// Its name, where the source has one.
    pub name: Option<String>,
    /// Number of images.
    pub count: usize,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The form.
    pub kind: SourceKind,
    /// The set in one line.
    pub source: String,
    /// The place, if there is one.
    pub path: Option<PathBuf>,
    /// Images in all.
    pub count: usize,
    /// Images that were decoded for what follows.
    pub looked_at: usize,
    /// Their sizes, most frequent first.
    pub sizes: Vec<SizeCount>,
    /// Where labels come from, if the set has some.
    pub labels: Option<LabelRule>,
    /// The classes.
    pub classes: Vec<ClassCount>,
    /// Smallest value, 0..=255.
    pub min: u8,
    /// Largest value.
    pub max: u8,
    /// Mean of each channel, in the [−1, 1] that networks see.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, likewise.
    pub std: Vec<f64>,
    /// Standard deviation over all values, likewise: what a preconditioner calls `sigma_data`.
    pub sigma_data: f64,
    /// Files that are no images.
    pub ignored: usize,
    /// What is wrong or needs a decision.
    pub problems: Vec<String>,
}

impl Report {
    /// The data section of a config that reads this set as it is.
    pub fn spec(&self) -> SourceSpec {
        SourceSpec::new(self.kind, self.path.clone())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} images", self.source, self.count)?;
        if self.looked_at < self.count {
            writeln!(f, "  looked at {} of them, at equal distances", self.looked_at)?;
        }
        for size in self.sizes.iter().take(5) {
            let color = if size.channels == 1 { "grey" } else { "RGB" };
            writeln!(f, "  {}x{} {color}: {}", size.width, size.height, size.count)?;
        }
        if self.sizes.len() > 5 {
            writeln!(f, "  … {} sizes in all", self.sizes.len())?;
        }
        let list = |v: &[f64]| v.iter().map(|x| format!("{x:.4}")).collect::<Vec<_>>().join(" ");
        writeln!(f, "  values {}..{} of 0..255", self.min, self.max)?;
        writeln!(
            f,
            "  in [-1, 1]: mean {}, std {}, over all channels {:.4}",
            list(&self.mean),
            list(&self.std),
            self.sigma_data
        )?;
        match self.labels {
            None => writeln!(f, "  no labels")?,
            Some(rule) => {
                let from = match rule {
                    LabelRule::DatasetJson => " (from dataset.json)",
                    LabelRule::Prefix => " (file name before the first _)",
                    LabelRule::Folder => " (folder names)",
                    LabelRule::Auto | LabelRule::None => "",
                };
                writeln!(f, "  {} classes{from}:", self.classes.len())?;
            }
        }
        for class in self.classes.iter().take(20) {
            let name = class.name.as_ref().filter(|n| **n != class.class.to_string());
            let name = name.map_or(String::new(), |n| format!(" {n}"));
            writeln!(f, "    {}{name}: {}", class.class, class.count)?;
        }
        if let (Some(min), Some(max), true) = (
            self.classes.iter().map(|c| c.count).min(),
            self.classes.iter().map(|c| c.count).max(),
            self.classes.len() > 20,
        ) {
            writeln!(f, "    … {} classes in all, of {min} to {max} images", self.classes.len())?;
        }
        if self.ignored > 0 {
            writeln!(f, "  {} other files passed over", self.ignored)?;
        }
        for problem in &self.problems {
            writeln!(f, "  problem: {problem}")?;
        }
        Ok(())
    }
}
