//! What the demo does for a data set and a recipe.

use anyhow::{Result, bail};

use crate::args::{DemoData, DemoRecipe};

/// What differs between the demo's data sets and recipes.
pub struct Plan {
    /// The experiment.
    pub preset: &'static str,
    /// The experiment of the teacher, where the recipe needs one.
    pub teacher: Option<&'static str>,
    /// Time for everything but the teacher, in seconds, and as much again for the teacher.
    pub seconds: f64,
    /// The second noise level of two-step samples; `None` for a model that has but one step.
    pub second_sigma: Option<f64>,
    /// Images that are measured.
    pub measured: u64,
    /// Columns and number of images of the sample grids.
    pub grid: (usize, i64),
}

impl Plan {
    /// The plan of one recipe.
    ///
    /// # Errors
    /// For a recipe that is not set up for the data.
    pub fn of(data: DemoData, recipe: DemoRecipe) -> Result<Self> {
        let (preset, teacher) = match (data, recipe) {
            (DemoData::Digits, DemoRecipe::Ect) => ("digits-ect", None),
            (DemoData::Digits, DemoRecipe::Ict) => ("digits-ict", None),
            (DemoData::Digits, DemoRecipe::Ct) => ("digits-ct", None),
            (DemoData::Digits, DemoRecipe::Cd) => ("digits-cd", Some("digits-edm")),
            (DemoData::Digits, DemoRecipe::Pd) => ("digits-pd", Some("digits-edm")),
            (DemoData::Emoji, DemoRecipe::Ect) => ("emoji-ect", None),
            (DemoData::Emoji, DemoRecipe::Ict) => ("emoji-ict", None),
            (DemoData::Emoji, DemoRecipe::Ct) => ("emoji-ct", None),
            (DemoData::Emoji, DemoRecipe::Cd) => ("emoji-cd", Some("emoji-edm")),
            (DemoData::Emoji, DemoRecipe::Pd) => ("emoji-pd", Some("emoji-edm")),
            (DemoData::Fashion, DemoRecipe::Ect) => ("fashion-ect", None),
            (DemoData::Fashion, DemoRecipe::Ict) => ("fashion-ict", None),
            (DemoData::Fashion, DemoRecipe::Ct) => ("fashion-ct", None),
            (DemoData::Fashion, DemoRecipe::Cd) => ("fashion-cd", Some("fashion-edm")),
            (DemoData::Fashion, DemoRecipe::Pd) => ("fashion-pd", Some("fashion-edm")),
            (_, DemoRecipe::All) => bail!("--recipe all is several recipes"),
        };
        // A progressively distilled student has the steps that it was distilled to.
        let second = |sigma: f64| (recipe != DemoRecipe::Pd).then_some(sigma);
        let digits = Self {
            preset,
            teacher,
            seconds: 220.0,
            second_sigma: second(0.5),
            measured: 1000,
            grid: (16, 160),
        };
        Ok(match data {
            DemoData::Digits => digits,
            DemoData::Emoji => {
                Self { seconds: 1500.0, second_sigma: second(0.8), measured: 500, grid: (12, 96), ..digits }
            }
            DemoData::Fashion => Self { seconds: 1500.0, second_sigma: second(0.8), ..digits },
        })
    }
}

/// The recipes of `--recipe all`, in the order in which they are shown.
pub const ALL: [DemoRecipe; 5] =
    [DemoRecipe::Pd, DemoRecipe::Cd, DemoRecipe::Ct, DemoRecipe::Ict, DemoRecipe::Ect];
