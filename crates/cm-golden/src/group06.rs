//! Group 06: figures of sets of features.

use cm_eval::{
    Divisor, Moments, MomentsStream, Subset, frechet_distance, inception_score, kid, precision_recall,
};
use tch::Tensor;

use crate::close::{Tolerance, values};
use crate::golden::{Golden, Result, problem};
use crate::report::Checks;

/// 06: Fréchet distance, KID, Inception score, precision and recall.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let (real, generated) = (golden.input("real")?, golden.input("gen")?);
    let dim: i64 = golden.meta("d")?;
    for (name, features, count) in [("real", &real, "n_real"), ("gen", &generated, "n_gen")] {
        let stated = [golden.meta(count)?, dim];
        checks.fact(
            &format!("shape of {name}"),
            features.size() == stated,
            format!("{:?}, stated {stated:?}", features.size()),
        );
    }
    frechet(checks, &real, &generated, dim)?;
    kernel(checks, &real, &generated)?;
    score(checks)?;
    manifolds(checks)
}

fn moments(features: &Tensor, divisor: Divisor) -> Result<Moments> {
    let mut stream = MomentsStream::default();
    // Uneven batches, as an evaluation has them.
    for batch in features.split(37, 0) {
        stream.add(&batch)?;
    }
    Ok(stream.finish(divisor)?)
}

fn frechet(checks: &mut Checks<'_>, real: &Tensor, generated: &Tensor, dim: i64) -> Result<()> {
    let golden = checks.golden;
    let rel = Tolerance::Rel(golden.tolerance("fp64 rel")?);
    let (abs, few) = (golden.tolerance("FID abs")?, golden.tolerance("rankdef abs")?);
    let of = |divisor| Ok::<_, crate::Problem>((moments(real, divisor)?, moments(generated, divisor)?));
    let (a, b) = of(Divisor::CountLessOne)?;
    checks.tensor("mu_real", a.mean(), rel)?;
    checks.tensor("sigma_real", a.covariance(), rel)?;
    let distance = frechet_distance(&a, &b)?;
    for name in ["fid_pytorch_fid", "fid_edm"] {
        checks.values(name, &[distance], Tolerance::Abs(abs))?;
    }
    let (a, b) = of(Divisor::Count)?;
    checks.values("fid_ect", &[frechet_distance(&a, &b)?], Tolerance::Abs(abs))?;
    let half = |features: &Tensor| moments(&features.narrow(0, 0, dim / 2), Divisor::CountLessOne);
    let distance = frechet_distance(&half(real)?, &half(generated)?)?;
    checks.values("fid_rankdef", &[distance], Tolerance::Abs(few))?;
    Ok(())
}

/// The rows of each subset.
fn subset_rows(golden: &Golden, name: &str, size: i64) -> Result<Vec<Vec<i64>>> {
    let stated = golden.input(name)?.size();
    if stated.get(1) != Some(&size) {
        return problem(format!("'{name}' has shape {stated:?}, expected subsets of {size} rows"));
    }
    Ok(golden.input_integers(name)?.chunks(size as usize).map(<[i64]>::to_vec).collect())
}

fn kernel(checks: &mut Checks<'_>, real: &Tensor, generated: &Tensor) -> Result<()> {
    let golden = checks.golden;
    let tolerance = Tolerance::Rel(golden.tolerance("KID/IS rel")?);
    for (count, most) in golden.meta_json::<Vec<(usize, i64)>>("kid_subsets")? {
        let case = format!("s{count}_m{most}");
        let size = most.min(real.size()[0]).min(generated.size()[0]);
        let rows = |name: &str| subset_rows(golden, &format!("kid_idx_{name}.{case}"), size);
        let subsets: Vec<_> = std::iter::zip(rows("real")?, rows("gen")?)
            .map(|(real, generated)| Subset { real, generated })
            .collect();
        checks.fact(
            &format!("subsets of {case}"),
            subsets.len() == count,
            format!("{} of {count}", subsets.len()),
        );
        checks.values(&format!("kid.{case}"), &[kid(real, generated, &subsets)?.mean], tolerance)?;
    }
    Ok(())
}

fn score(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let tolerance = Tolerance::Rel(golden.tolerance("KID/IS rel")?);
    let logits = golden.input("logits")?;
    for splits in golden.meta_json::<Vec<u64>>("is_splits")? {
        let score = inception_score(&logits, splits)?;
        checks.values(&format!("is.splits{splits}"), &[score.mean, score.std], tolerance)?;
    }
    Ok(())
}

fn manifolds(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let rel = Tolerance::Rel(golden.tolerance("fp64 rel")?);
    let (real, generated) = (golden.input("pr_real")?, golden.input("pr_gen")?);
    for k in golden.meta_json::<Vec<i64>>("pr_k")? {
        let found = precision_recall(&real, &generated, k)?;
        checks.tensor(&format!("radii_real.k{k}"), &found.radii_real, rel)?;
        checks.tensor(&format!("radii_gen.k{k}"), &found.radii_generated, rel)?;
        checks.values(&format!("precision.k{k}"), &[found.precision], Tolerance::Exact)?;
        checks.values(&format!("recall.k{k}"), &[found.recall], Tolerance::Exact)?;
        for (name, covered) in [("gen", found.generated_covered), ("real", found.real_covered)] {
            checks.values(&format!("pred_{name}.k{k}"), &values(&covered), Tolerance::Exact)?;
        }
    }
    Ok(())
}
