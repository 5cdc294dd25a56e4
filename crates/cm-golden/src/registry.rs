//! Which code checks which file.

use crate::golden::{Golden, Result, problem};
use crate::report::Checks;
use crate::{group01, group02, group03, group04, group05, group06, group07, group08, group09};

/// The files that an entry is for: by the beginning of their name and, where one letter holds several kinds, by
/// a metadata value.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Beginning of the file's name.
    pub prefix: &'static str,
    /// A metadata key and the values that it may have.
    pub only: Option<(&'static str, &'static [&'static str])>,
}

impl Kind {
    /// Whether the file is of this kind.
    pub fn holds(&self, golden: &Golden) -> bool {
        let value_fits =
            |(key, values): (&str, &[&str])| golden.meta_text(key).is_some_and(|v| values.contains(&v));
        golden.stem.starts_with(self.prefix) && self.only.is_none_or(value_fits)
    }

    /// Whether a file could be of both kinds.
    pub fn overlaps(&self, other: &Kind) -> bool {
        let nested = self.prefix.starts_with(other.prefix) || other.prefix.starts_with(self.prefix);
        let compatible = match (self.only, other.only) {
            (Some((key, mine)), Some((same, theirs))) if key == same => {
                mine.iter().any(|v| theirs.contains(v))
            }
            _ => true,
        };
        nested && compatible
    }
}

/// Runs everything that a file allows.
pub type Check = fn(&mut Checks<'_>) -> Result<()>;

/// A kind of file and the code that checks it.
#[derive(Debug, Clone, Copy)]
pub struct Checker {
    /// The files.
    pub kind: Kind,
    /// The code.
    pub check: Check,
}

const fn all(prefix: &'static str) -> Kind {
    Kind { prefix, only: None }
}

const fn only(prefix: &'static str, key: &'static str, values: &'static [&'static str]) -> Kind {
    Kind { prefix, only: Some((key, values)) }
}

const fn checker(kind: Kind, check: Check) -> Checker {
    Checker { kind, check }
}

/// Everything that is built.
pub const CHECKERS: &[Checker] = &[
    checker(only("01", "precond", group01::PRECONDS), group01::network),
    checker(only("01", "precond", &["UNetBlock"]), group01::block),
    checker(all("02"), group02::check),
    checker(all("03a"), group03::sigma_grids),
    checker(all("03b"), group03::scalings),
    checker(all("03c"), group03::ema_and_scales),
    checker(all("03d"), group03::improved),
    checker(all("03e"), group03::easy),
    checker(all("03f"), group03::ema_warm_up),
    checker(all("04a"), group04::weights),
    checker(only("04b", "kind", &["CT"]), group04::consistency_training),
    checker(only("04b", "kind", &["CD"]), group04::teachers::consistency_distillation),
    checker(only("04b", "kind", &["PD"]), group04::teachers::progressive_distillation),
    checker(only("04b", "kind", &["EDM"]), group04::teachers::diffusion),
    checker(only("04c", "loss", &["ECMLoss"]), group04::easy_consistency),
    checker(only("04c", "loss", group04::diffusion::LOSSES), group04::diffusion::check),
    checker(all("04d"), group04::improved_training),
    checker(all("04e"), group04::optimisers),
    checker(only("05a", "sampler", group05::OPENAI_SAMPLERS), group05::openai),
    checker(only("05b", "sampler", group05::OPENAI_SAMPLERS), group05::openai_network),
    checker(only("05c", "kind", group05::edit::KINDS), group05::edit::openai),
    checker(only("05d", "fn", &["edm_sampler"]), group05::edm),
    checker(only("05d", "fn", &["ablation_sampler"]), group05::ablation::check),
    checker(all("05e"), group05::edm_network),
    checker(all("05f"), group05::third_party::check),
    checker(all("05g"), group05::ect_generator),
    checker(all("05h"), group05::dpmpp_2m),
    checker(all("06"), group06::check),
    checker(only("07_lpips", "net", group07::PACKAGE_NETS), group07::package),
    checker(only("07_openai_lpips", "net", &["vgg16"]), group07::openai),
    checker(only("07_openai_cd", "kind", &["CD"]), group04::teachers::consistency_distillation),
    checker(all("08"), group08::check),
    checker(all("09"), group09::check),
];

/// Finds the one checker for a file.
///
/// # Errors
/// [`crate::Problem`] if nothing knows the file, or if more than one checker claims it.
pub fn find(golden: &Golden) -> Result<Check> {
    let checks = CHECKERS.iter().filter(|c| c.kind.holds(golden)).map(|c| c.check);
    match checks.collect::<Vec<_>>()[..] {
        [check] => Ok(check),
        [] => problem("nothing checks such a file"),
        _ => problem("more than one checker of the registry claims this file"),
    }
}

/// Checks that no two checkers claim a file.
///
/// # Errors
/// [`crate::Problem`] with the two.
pub fn validate() -> Result<()> {
    for (i, checker) in CHECKERS.iter().enumerate() {
        if let Some(other) = CHECKERS[i + 1..].iter().find(|c| c.kind.overlaps(&checker.kind)) {
            return problem(format!("two checkers claim '{}' files: {:?}", checker.kind.prefix, other.kind));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_checkers_claim_a_file() {
        assert_eq!(validate(), Ok(()));
    }

    #[test]
    fn overlap_needs_a_common_name_and_a_common_value() {
        let ct = only("04b", "kind", &["CT"]);
        assert!(ct.overlaps(&all("04b")) && all("04").overlaps(&ct));
        assert!(ct.overlaps(&only("04b", "kind", &["CD", "CT"])));
        assert!(!ct.overlaps(&only("04b", "kind", &["CD"])));
        assert!(!ct.overlaps(&all("04c")));
        // Different keys can both hold for one file.
        assert!(ct.overlaps(&only("04b", "loss", &["x"])));
    }
}
