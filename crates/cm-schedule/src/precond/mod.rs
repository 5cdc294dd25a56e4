//! Preconditioning: the four scalars that turn a raw network F into a denoiser or a consistency function.
//!
//! At noise level σ the wrapped function is c_skip·x + c_out·F(c_in·x, c_noise). The scalars keep the input and the
//! target of F at unit size at every level, so that one network serves all of them.
//!
//! [`Edm`] makes a denoiser D(x; σ) ≈ E\[x₀ | x\]. [`Boundary`] makes a consistency function: shifted so that
//! f(x, σ_min) = x for any network. The forms of older models are in [`mod@reference`].

pub mod reference;

use crate::error::{Result, ensure_positive, validated_serde};
use serde::{Deserialize, Serialize};

/// The four scalars of one noise level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scalings {
    /// Factor of the noisy image itself.
    pub c_skip: f64,
    /// Factor of the network's output.
    pub c_out: f64,
    /// Factor of the noisy image at the network's input.
    pub c_in: f64,
    /// What the network is told about the noise level.
    pub c_noise: f64,
}

/// A rule that gives the four scalars for any noise level.
pub trait Precond {
    /// The scalars at `sigma` (> 0, data units).
    fn scalings(&self, sigma: f64) -> Scalings;
}

/// What the network is told about the noise level.
///
/// The two forms belong to the two families of published networks, whose embeddings expect numbers of that size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseCond {
    /// ln(σ)/4: EDM's networks and their descendants (ECT, and the CIFAR-10 models of Consistency Models).
    QuarterLog,
    /// 1000 · ln(σ + 10⁻⁴⁴)/4: the networks that OpenAI released for ImageNet-64 and LSUN.
    ThousandQuarterLog,
}

impl NoiseCond {
    /// The number for noise level `sigma`.
    ///
    /// ```
    /// use cm_schedule::precond::NoiseCond;
    /// assert_eq!(NoiseCond::QuarterLog.value(1.0), 0.0);
    /// // ln 80 = 4.382
    /// assert!((NoiseCond::ThousandQuarterLog.value(80.0) - 1095.5).abs() < 0.1);
    /// ```
    #[must_use]
    pub fn value(self, sigma: f64) -> f64 {
        match self {
            NoiseCond::QuarterLog => sigma.ln() / 4.0,
            // The tiny number guards the logarithm in the released code; it is far below half an ulp of any
            // allowed σ and stands here only because the published networks were trained with it.
            NoiseCond::ThousandQuarterLog => 250.0 * (sigma + 1e-44).ln(),
        }
    }
}

/// EDM's preconditioning: a denoiser.
///
/// c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), with σ_d the standard deviation
/// of the data.
///
/// # Source
/// EDM (arXiv 2206.00364) Table 1, last column.
///
/// ```
/// use cm_schedule::precond::{Edm, NoiseCond, Precond};
/// // At σ = σ_d = 0.5 half of the input passes.
/// let s = Edm::new(0.5, NoiseCond::QuarterLog).unwrap().scalings(0.5);
/// assert_eq!(s.c_skip, 0.5);
/// assert!((s.c_in - 2f64.sqrt()).abs() < 1e-15);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Edm {
    sigma_data: f64,
    noise_cond: NoiseCond,
}
validated_serde!(Edm);

impl Edm {
    /// EDM's scalars for data of standard deviation `sigma_data` (0.5 for images in [−1, 1]).
    ///
    /// # Errors
    /// When `sigma_data` is not a finite number above 0.
    pub fn new(sigma_data: f64, noise_cond: NoiseCond) -> Result<Self> {
        let edm = Edm { sigma_data, noise_cond };
        edm.validate()?;
        Ok(edm)
    }

    fn validate(&self) -> Result<()> {
        ensure_positive("sigma_data", self.sigma_data, SIGMA_DATA_ADVICE)
    }

    /// σ_d.
    #[must_use]
    pub fn sigma_data(&self) -> f64 {
        self.sigma_data
    }

    /// What the network is told about σ.
    #[must_use]
    pub fn noise_cond(&self) -> NoiseCond {
        self.noise_cond
    }
}

const SIGMA_DATA_ADVICE: &str = "it is the standard deviation of the data: 0.5 for images in [-1, 1]";

impl Precond for Edm {
    fn scalings(&self, sigma: f64) -> Scalings {
        let sd = self.sigma_data;
        let total = sigma * sigma + sd * sd;
        Scalings {
            c_skip: sd * sd / total,
            c_out: sigma * sd / total.sqrt(),
            c_in: 1.0 / total.sqrt(),
            c_noise: self.noise_cond.value(sigma),
        }
    }
}

/// EDM's preconditioning shifted to the boundary condition: a consistency function, f(x, σ_min) = x for any network.
///
/// c_skip = σ_d²/((σ − σ_min)² + σ_d²), c_out = σ_d (σ − σ_min)/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²). The shift is
/// in the numerator of c_out alone, as printed in the paper and as released.
///
/// ECT (arXiv 2406.14548) trains with the unshifted [`Edm`] scalars and evaluates with these at σ_min = 0.003: its
/// training and its sampling use slightly different functions, which shows near σ_min (at σ = 0.003 the trained
/// function still has c_out = 0.003, the evaluated one 0). A port of ECT's numbers needs both; a model trained here
/// uses one for both.
///
/// # Source
/// Consistency Models (arXiv 2303.01469) appendix C; `get_scalings_for_boundary_condition` in its released code.
///
/// ```
/// use cm_schedule::precond::{Boundary, NoiseCond, Precond};
/// let s = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap().scalings(0.002);
/// assert_eq!((s.c_skip, s.c_out), (1.0, 0.0));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Boundary {
    sigma_data: f64,
    sigma_min: f64,
    noise_cond: NoiseCond,
}
validated_serde!(Boundary);

impl Boundary {
    /// Scalars with the boundary at `sigma_min` for data of standard deviation `sigma_data`.
    ///
    /// # Errors
    /// When one of the two is not a finite number above 0.
    pub fn new(sigma_data: f64, sigma_min: f64, noise_cond: NoiseCond) -> Result<Self> {
        let boundary = Boundary { sigma_data, sigma_min, noise_cond };
        boundary.validate()?;
        Ok(boundary)
    }

    fn validate(&self) -> Result<()> {
        ensure_positive("sigma_data", self.sigma_data, SIGMA_DATA_ADVICE)?;
        ensure_positive("sigma_min", self.sigma_min, crate::sigma::SIGMA_MIN_ADVICE)
    }

    /// σ_d.
    #[must_use]
    pub fn sigma_data(&self) -> f64 {
        self.sigma_data
    }

    /// The level at which f is the identity.
    #[must_use]
    pub fn sigma_min(&self) -> f64 {
        self.sigma_min
    }

    /// What the network is told about σ.
    #[must_use]
    pub fn noise_cond(&self) -> NoiseCond {
        self.noise_cond
    }
}

impl Precond for Boundary {
    fn scalings(&self, sigma: f64) -> Scalings {
        let sd = self.sigma_data;
        let above = sigma - self.sigma_min;
        let norm = (sigma * sigma + sd * sd).sqrt();
        Scalings {
            c_skip: sd * sd / (above * above + sd * sd),
            c_out: sd * above / norm,
            c_in: 1.0 / norm,
            c_noise: self.noise_cond.value(sigma),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(got: f64, want: f64, tolerance: f64) {
        assert!((got - want).abs() <= tolerance * want.abs(), "got {got}, want {want}");
    }

    /// (σ, c_skip, c_out, c_in) of the boundary form at σ_min = 0.002 and σ_d = 0.5, computed apart from this code.
    #[test]
    fn boundary_scalars_of_the_paper() {
        let boundary = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
        let cases = [
            (0.5, 0.502_004, 0.352_139, 2f64.sqrt()),
            (2.0, 0.058_934_4, 0.484_586, 0.485_071),
            (80.0, 3.906_29e-5, 0.499_978, 0.012_499_8),
        ];
        for (sigma, c_skip, c_out, c_in) in cases {
            let s = boundary.scalings(sigma);
            close(s.c_skip, c_skip, 2e-6);
            close(s.c_out, c_out, 2e-6);
            close(s.c_in, c_in, 5e-6);
            close(s.c_noise, sigma.ln() / 4.0, 1e-15);
        }
        close(boundary.scalings(0.002).c_in, 1.999_98, 1e-5);
    }

    /// What ECT evaluates with at one level of its golden file, σ = 0.05: skip 0.9912413, out 0.0467667.
    #[test]
    fn ect_evaluates_with_the_boundary_at_0_003() {
        let s = Boundary::new(0.5, 0.003, NoiseCond::QuarterLog).unwrap().scalings(0.05);
        close(s.c_skip, 0.991_241_33, 1e-7);
        close(s.c_out, 0.046_766_747, 1e-6);
    }

    #[test]
    fn wrong_numbers_are_refused_in_code_and_in_files() {
        assert!(Edm::new(0.0, NoiseCond::QuarterLog).is_err());
        assert!(Edm::new(f64::NAN, NoiseCond::QuarterLog).is_err());
        assert!(Boundary::new(0.5, 0.0, NoiseCond::QuarterLog).unwrap_err().to_string().contains("log(0)"));
        let text = r#"{"sigma_data":0.5,"sigma_min":0.002,"noise_cond":"thousand_quarter_log"}"#;
        let boundary: Boundary = serde_json::from_str(text).unwrap();
        assert_eq!(boundary, Boundary::new(0.5, 0.002, NoiseCond::ThousandQuarterLog).unwrap());
        assert_eq!(serde_json::to_string(&boundary).unwrap(), text);
        assert!(serde_json::from_str::<Boundary>(&text.replace("0.002", "0")).is_err());
        assert!(serde_json::from_str::<Edm>(text).unwrap_err().to_string().contains("sigma_min"));
    }

    proptest! {
        /// The loss weight of EDM times c_out² is 1 at every level; input and target of F have unit variance.
        #[test]
        fn edm_balances_input_and_target(sigma in 1e-3..1e3f64, sd in 0.1..3.0f64) {
            let s = Edm::new(sd, NoiseCond::QuarterLog).unwrap().scalings(sigma);
            let weight = (sigma * sigma + sd * sd) / (sigma * sd).powi(2);
            prop_assert!((weight * s.c_out * s.c_out - 1.0).abs() < 1e-12);
            prop_assert!((s.c_in * s.c_in * (sigma * sigma + sd * sd) - 1.0).abs() < 1e-12);
            let target = ((1.0 - s.c_skip) * sd).powi(2) + (s.c_skip * sigma).powi(2);
            prop_assert!((target / (s.c_out * s.c_out) - 1.0).abs() < 1e-9);
        }

        #[test]
        fn boundary_is_the_identity_at_sigma_min(sigma_min in 1e-4..1.0f64, sd in 0.1..3.0f64) {
            let s = Boundary::new(sd, sigma_min, NoiseCond::QuarterLog).unwrap().scalings(sigma_min);
            prop_assert_eq!((s.c_skip, s.c_out), (1.0, 0.0));
        }
    }
}
