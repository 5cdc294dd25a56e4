//! How good samples are.
//!
//! The maths of the field's figures on any features: [`frechet_distance`] (FID, sFID), [`kid`],
//! [`inception_score`] and [`precision_recall`].
//!
//! A [`Collector`] streams images through a [`FeatureNet`] and keeps what they need: `cm_net::Inception` with the default
//! feature `nets`, the [`Classifier`], or any other network.
//!
//! And figures without any downloaded network.
//!
//! A small [`Classifier`] that is trained on the data set at hand says whether a sample is clearly one of the
//! classes; distances to training images say whether it lies where real held-out images lie, and whether it is
//! a copy. [`Yardstick`] holds both and gives the same [`Figures`] for any set of images, so that samples stand
//! beside real images, a Gaussian fit and noise.
#![deny(missing_docs)]

mod baseline;
mod classifier;
mod collect;
mod error;
mod features;
mod figures;
mod frechet;
mod inception_score;
mod kid;
mod manifold;
#[cfg(test)]
mod testing;

pub use baseline::{gaussian_fit, noise};
pub use classifier::{Classifier, ClassifierSpec};
pub use collect::{Collector, FeatureNet, Measured, Parts, Seen};
pub use error::{Error, Result};
pub use figures::{Figures, Yardstick};
pub use frechet::{Divisor, Moments, MomentsStream, SampleSize, frechet_distance};
pub use inception_score::{InceptionScore, InceptionScoreStream, inception_score};
pub use kid::{Kid, Subset, kid, kid_subsets};
pub use manifold::{PrecisionRecall, precision_recall};
