//! Where the time points of multistep sampling are best: a greedy ternary search on the grid of noise levels.
//!
//! Song et al. 2023 (Sec. 3, "Sampling") choose the points one at a time: with those found so far held fixed, the
//! next one is where the samples are best by some score, FID in the paper. Given the points before it, the score is
//! taken to fall and then to rise with the next one, so that a ternary search finds its minimum with few evaluations,
//! each of which means sampling thousands of images.
//!
//! ```
//! use cm_sampler::search::{Scores, TimeSearch};
//! // A stand-in for "sample with these points and compute FID": best at 14 and then 27.
//! let fid = |ts: &[usize]| {
//!     let wanted = [14.0, 27.0];
//!     let inner = &ts[1..ts.len() - 1];
//!     Ok::<f64, cm_sampler::Error>(inner.iter().zip(wanted).map(|(&t, w)| (t as f64 - w).powi(2)).sum())
//! };
//! let mut known = Scores::default();
//! let found = TimeSearch::new(2, 40)?.run(&mut known, fid)?;
//! assert_eq!(found.ts, [0, 14, 27, 39]);
//! // `known` holds every evaluation: with it, a second search asks for none.
//! let again = TimeSearch::new(2, 40)?.run(&mut known, |_| -> cm_sampler::Result<f64> { panic!("all is known") })?;
//! assert_eq!(again, found);
//! # Ok::<(), cm_sampler::Error>(())
//! ```

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Time points and their score; lower is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scored {
    /// Positions on the grid, from 0 = σ_max to its last, as in [`Times::Indices`](crate::Times::Indices).
    pub ts: Vec<usize>,
    /// Their score.
    pub score: f64,
}

/// What has been evaluated. Kept, it makes a search resumable; as serde sees it, it is a list of [`Scored`]s.
///
/// ```
/// use cm_sampler::search::{Scored, Scores};
/// let scores: Scores = [Scored { ts: vec![0, 22, 39], score: 4.7 }].into_iter().collect();
/// assert_eq!(scores.get(&[0, 22, 39]), Some(4.7));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Vec<Scored>", into = "Vec<Scored>")]
pub struct Scores(BTreeMap<Vec<usize>, f64>);

impl Scores {
    /// The score of these points, if it is known.
    #[must_use]
    pub fn get(&self, ts: &[usize]) -> Option<f64> {
        self.0.get(ts).copied()
    }

    /// Number of evaluations.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing has been evaluated.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Extend<Scored> for Scores {
    fn extend<I: IntoIterator<Item = Scored>>(&mut self, evaluations: I) {
        self.0.extend(evaluations.into_iter().map(|Scored { ts, score }| (ts, score)));
    }
}

impl FromIterator<Scored> for Scores {
    fn from_iter<I: IntoIterator<Item = Scored>>(evaluations: I) -> Self {
        let mut scores = Self::default();
        scores.extend(evaluations);
        scores
    }
}

impl From<Vec<Scored>> for Scores {
    fn from(evaluations: Vec<Scored>) -> Self {
        evaluations.into_iter().collect()
    }
}

impl From<Scores> for Vec<Scored> {
    fn from(scores: Scores) -> Self {
        scores.0.into_iter().map(|(ts, score)| Scored { ts, score }).collect()
    }
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The points, the ends of the grid included: what goes into [`Times::Indices`](crate::Times::Indices).
    pub ts: Vec<usize>,
    /// Their score; `None` where there was no choice for the last point, so that nothing was evaluated for it.
    pub score: Option<f64>,
}

/// A search for `points` time points between the ends of a grid of `steps` levels.
///
/// Points are found from σ_max downwards. Each is sought below the one before, by the score of sampling with all points
/// found so far; so a search for more points begins with those of a search for fewer. Where the lowest score leaves too
/// few places for the points to come, the last place that leaves enough is taken, which by the assumption is the best of
/// those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeSearch {
    points: usize,
    steps: usize,
}

impl TimeSearch {
    /// A search; `points` lie between the two ends, so that sampling takes `points + 1` evaluations of the model.
    ///
    /// # Errors
    /// [`Error::NoRoom`] unless 1 ≤ `points` ≤ `steps` − 2.
    pub fn new(points: usize, steps: usize) -> Result<Self> {
        if points == 0 || points > steps.saturating_sub(2) {
            return Err(Error::NoRoom { points, steps });
        }
        Ok(Self { points, steps })
    }

    /// The most evaluations that a search can take: for each point, 2⌈log₁.₅ n⌉ of the n places it may have.
    ///
    /// ```
    /// use cm_sampler::search::TimeSearch;
    /// // 38 places: log₁.₅ 38 = 8.97.
    /// assert_eq!(TimeSearch::new(1, 40)?.most_evaluations(), 18);
    /// # Ok::<(), cm_sampler::Error>(())
    /// ```
    #[must_use]
    pub fn most_evaluations(&self) -> usize {
        // Every point found leaves at least one place less for the next.
        (0..self.points).map(|found| most_for(self.steps - 2 - found)).sum()
    }

    /// Searches. `score` is asked for what `known` does not hold, once for each list of points, and its answers are
    /// added to `known`; whoever wants to go on after a crash writes them down in `score` too.
    ///
    /// # Errors
    /// The first error of `score`, and [`Error::Score`] for a score that is not finite.
    pub fn run<E: From<Error>>(
        &self,
        known: &mut Scores,
        mut score: impl FnMut(&[usize]) -> Result<f64, E>,
    ) -> Result<Found, E> {
        let mut ts = vec![0];
        let mut best = None;
        for to_come in (0..self.points).rev() {
            let places = ts.last().map_or(1, |last| last + 1)..=self.steps - 2;
            let with = |index: usize| [ts.as_slice(), &[index, self.steps - 1]].concat();
            let (index, score) = lowest(places, |index| -> Result<f64, E> {
                let ts = with(index);
                if let Some(score) = known.get(&ts) {
                    return Ok(score);
                }
                let score = score(&ts)?;
                if !score.is_finite() {
                    return Err(Error::Score { ts, score }.into());
                }
                known.extend([Scored { ts, score }]);
                Ok(score)
            })?;
            ts.push(index.min(self.steps - 2 - to_come));
            best = score;
        }
        ts.push(self.steps - 1);
        Ok(Found { ts, score: best })
    }
}

/// 2⌈log₁.₅ n⌉.
fn most_for(places: usize) -> usize {
    let mut rounds = 0;
    let mut reach = 1.0;
    while reach < places as f64 {
        reach *= 1.5;
        rounds += 1;
    }
    2 * rounds
}

/// The place of the lowest score, for scores that fall strictly, may stay at their lowest, and then rise strictly.
///
/// A place is asked for at most once in a round; `score` remembers. With one place there is nothing to find out.
fn lowest<E>(
    places: RangeInclusive<usize>,
    mut score: impl FnMut(usize) -> Result<f64, E>,
) -> Result<(usize, Option<f64>), E> {
    let (mut first, mut last) = places.into_inner();
    if first == last {
        return Ok((first, None));
    }
    // Three places or fewer have no two thirds: below, each of them is looked at.
    while last - first >= 3 {
        let third = (last - first) / 3;
        let (left, right) = (first + third, last - third);
        // Equal scores lie on both sides of the lowest, or are the lowest: `left` stays.
        if score(left)? <= score(right)? {
            last = right - 1;
        } else {
            first = left + 1;
        }
    }
    let mut best = (first, score(first)?);
    for place in first + 1..=last {
        let score = score(place)?;
        if score < best.1 {
            best = (place, score);
        }
    }
    Ok((best.0, Some(best.1)))
}
