//! The search for time points finds the minimum of every unimodal score, with the evaluations that it promises.

use std::collections::BTreeSet;

use cm_sampler::Error;
use cm_sampler::search::{Found, Scored, Scores, TimeSearch};
use proptest::collection::vec;
use proptest::prelude::*;

/// Runs a search and checks that no points are scored twice. Returns how many were.
fn counted(search: TimeSearch, known: &mut Scores, mut score: impl FnMut(&[usize]) -> f64) -> (Found, usize) {
    let mut asked = BTreeSet::new();
    let found = search.run(known, |ts| {
        assert!(asked.insert(ts.to_vec()), "{ts:?} was scored before");
        assert!(ts.windows(2).all(|pair| pair[0] < pair[1]), "{ts:?} rise");
        Ok::<_, Error>(score(ts))
    });
    (found.unwrap(), asked.len())
}

/// 2⌈log₁.₅ n⌉, from the definition.
fn bound(places: usize) -> usize {
    2 * (0..).find(|&k| 1.5f64.powi(k) >= places as f64).unwrap() as usize
}

/// A score of one point that falls with these steps, stays, and rises with these.
fn valley(falls: &[f64], flat: usize, rises: &[f64]) -> Vec<f64> {
    let mut scores = vec![falls.iter().sum::<f64>()];
    let next = |scores: &mut Vec<f64>, step: f64| scores.push(scores[scores.len() - 1] + step);
    falls.iter().for_each(|fall| next(&mut scores, -fall));
    (0..flat).for_each(|_| next(&mut scores, 0.0));
    rises.iter().for_each(|rise| next(&mut scores, *rise));
    scores
}

fn check_valley(scores: &[f64]) -> Result<(), TestCaseError> {
    let search = TimeSearch::new(1, scores.len() + 2).unwrap();
    let (found, asked) = counted(search, &mut Scores::default(), |ts| scores[ts[1] - 1]);
    let lowest = scores.iter().copied().fold(f64::INFINITY, f64::min);
    prop_assert_eq!(scores[found.ts[1] - 1], lowest);
    prop_assert_eq!(found.score.unwrap_or(lowest), lowest);
    prop_assert!(asked <= bound(scores.len()), "{} evaluations of {} places", asked, scores.len());
    prop_assert_eq!(search.most_evaluations(), bound(scores.len()));
    Ok(())
}

proptest! {
    #[test]
    fn the_lowest_point_of_every_valley_is_found(
        falls in vec(1.0..9.0, 0..60), flat in 0usize..4, rises in vec(1.0..9.0, 0..60),
    ) {
        check_valley(&valley(&falls, flat, &rises))?;
    }

    /// Each point has its own valley; the later ones lie below the earlier, as good time points do.
    #[test]
    fn several_points_are_found_one_after_the_other(
        gaps in vec(1usize..25, 1..5), left in 1usize..25, weights in vec(0.5..2.0, 5),
    ) {
        let mut wanted = vec![0];
        gaps.iter().for_each(|gap| wanted.push(wanted[wanted.len() - 1] + gap));
        wanted.push(wanted[wanted.len() - 1] + left);
        let steps = wanted[wanted.len() - 1] + 1;
        let search = TimeSearch::new(gaps.len(), steps).unwrap();
        let score = |ts: &[usize]| {
            let far = |(i, &t): (usize, &usize)| (t as f64 - wanted[i + 1] as f64).abs() * weights[i];
            ts[1..ts.len() - 1].iter().enumerate().map(far).sum()
        };
        let mut known = Scores::default();
        let (found, asked) = counted(search, &mut known, score);
        prop_assert_eq!(&found.ts, &wanted);
        prop_assert!(asked <= search.most_evaluations());
        prop_assert_eq!(known.len(), asked);
        // With what is known, nothing is asked again.
        prop_assert_eq!(counted(search, &mut known, |_| f64::NAN), (found, 0));
    }
}

#[test]
fn intervals_of_one_two_and_three_points_are_right() {
    for places in 1..=3 {
        for lowest in 0..places {
            let scores: Vec<f64> = (0..places).map(|i| f64::from(i32::abs(i - lowest))).collect();
            check_valley(&scores).unwrap();
        }
    }
    // One place is no question.
    let (found, asked) = counted(TimeSearch::new(1, 3).unwrap(), &mut Scores::default(), |_| f64::NAN);
    assert_eq!((found, asked), (Found { ts: vec![0, 1, 2], score: None }, 0));
    // Room is left for points to come, wherever the scores would have them.
    let late = |ts: &[usize]| -(ts[ts.len() - 2] as f64);
    for points in 1..=8 {
        let search = TimeSearch::new(points, 10).unwrap();
        let (found, asked) = counted(search, &mut Scores::default(), late);
        let wanted: Vec<usize> = [0].into_iter().chain(9 - points..=9).collect();
        assert_eq!(found.ts, wanted);
        assert!(asked <= search.most_evaluations());
    }
}

#[test]
fn a_search_for_more_points_begins_with_what_one_for_fewer_found() {
    let score = |ts: &[usize]| {
        let inner = ts[1..ts.len() - 1].iter().zip([31.0, 44.0, 50.0]);
        inner.map(|(&t, wanted)| (t as f64 - wanted).powi(2)).sum::<f64>()
    };
    let mut known = Scores::default();
    for points in 1..=3 {
        let before = known.len();
        let (found, asked) = counted(TimeSearch::new(points, 60).unwrap(), &mut known, score);
        assert_eq!(found.ts[1..=points], [31, 44, 50][..points]);
        let places = [58, 28, 15][points - 1];
        assert_eq!(known.len() - before, asked);
        assert!(asked <= bound(places), "the {points}th point alone: {asked}");
    }
}

#[test]
fn an_interrupted_search_goes_on_where_it_stood() {
    let search = TimeSearch::new(2, 60).unwrap();
    let score = |ts: &[usize]| {
        let inner = &ts[1..ts.len() - 1];
        inner.iter().zip([31.0, 44.0]).map(|(&t, wanted)| (t as f64 - wanted).powi(2)).sum::<f64>()
    };
    let (whole, in_all) = counted(search, &mut Scores::default(), score);
    assert_eq!(whole.ts, [0, 31, 44, 59]);
    let mut written = String::from("[]");
    let mut asked = 0;
    for _ in 0..in_all {
        // Every run makes one evaluation, writes it down, and is then interrupted.
        let mut known: Scores = serde_json::from_str(&written).unwrap();
        let mut left = 1;
        let ended = search.run(&mut known, |ts| match left {
            0 => Err(Error::EmptyBatch),
            _ => {
                left -= 1;
                asked += 1;
                Ok(score(ts))
            }
        });
        written = serde_json::to_string(&known).unwrap();
        if let Ok(found) = ended {
            assert_eq!(found, whole);
        }
    }
    assert_eq!(asked, in_all);
    let (found, more) = counted(search, &mut serde_json::from_str(&written).unwrap(), score);
    assert_eq!((found, more), (whole, 0));
}

#[test]
fn what_cannot_be_searched_is_refused() {
    for (points, steps) in [(0, 40), (1, 2), (39, 40), (1, 0), (usize::MAX, 40)] {
        let error = TimeSearch::new(points, steps).unwrap_err();
        assert!(matches!(error, Error::NoRoom { .. }) && error.to_string().contains("expected from 1 to"));
    }
    let search = TimeSearch::new(1, 10).unwrap();
    for bad in [f64::NAN, f64::INFINITY] {
        let mut known = Scores::default();
        let error = search.run(&mut known, |_| Ok::<_, Error>(bad)).unwrap_err();
        assert!(matches!(error, Error::Score { ts, .. } if ts == [0, 3, 9]) && known.is_empty());
    }
    let unknown = serde_json::from_str::<Scored>(r#"{"ts": [0, 2], "score": 1, "more": 0}"#);
    assert!(unknown.is_err());
}
