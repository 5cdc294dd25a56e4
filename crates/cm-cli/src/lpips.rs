//! The perceptual distance of a training run: its weights are found, loaded, or made up where nothing is trained.

use std::rc::Rc;

use anyhow::{Context, Result};
use cm_model::ImageShape;
use cm_net::Lpips;
use cm_net::lpips::LpipsSpec;
use cm_train::{Error, ImageDistance, Metric};
use tch::Device;

/// Checks that images of `shape` can be measured. The weights need not be there.
pub fn check(metric: &Metric, shape: ImageShape) -> Result<()> {
    match metric.lpips() {
        Some((spec, _)) => fits(spec, shape),
        None => Ok(()),
    }
}

/// Why the metric cannot be used as long as nothing is fetched, if it cannot: the file of its weights is missing.
pub fn missing_weights(metric: &Metric) -> Option<Error> {
    let (spec, file) = metric.lpips()?;
    (!file.is_file()).then_some(Error::MissingWeights { net: spec.net, file })
}

/// What the metric measures with, if it needs a network: LPIPS in float32, with the weights from the file that the
/// metric names or from the usual place.
pub fn load_metric(
    metric: &Metric,
    shape: ImageShape,
    device: Device,
) -> Result<Option<Rc<dyn ImageDistance>>> {
    let Some((spec, file)) = metric.lpips() else { return Ok(None) };
    fits(spec, shape)?;
    if let Some(error) = missing_weights(metric) {
        return Err(error.into());
    }
    let lpips = Lpips::load(&file, spec, device).context("train.metric")?;
    Ok(Some(Rc::new(lpips)))
}

/// As [`load_metric`], with random weights in place of a file: what it costs is true, what it measures is not.
pub fn stand_in(metric: &Metric, shape: ImageShape, device: Device) -> Result<Option<Rc<dyn ImageDistance>>> {
    let Some((spec, _)) = metric.lpips() else { return Ok(None) };
    fits(spec, shape)?;
    Ok(Some(Rc::new(Lpips::random(spec, 0, device)?)))
}

fn fits(spec: LpipsSpec, shape: ImageShape) -> Result<()> {
    cm_net::lpips::check(spec, shape).context("train.metric")
}

#[cfg(test)]
mod tests {
    use cm_model::{LpipsNet, LpipsReading};
    use cm_net::lpips::convert;
    use tch::{Kind, Tensor};

    use super::*;

    const SHAPE: ImageShape = ImageShape { channels: 1, height: 32, width: 32 };

    fn alex(weights: &std::path::Path) -> Metric {
        let (net, reading) = (LpipsNet::Alex, LpipsReading::Package);
        Metric::Lpips { net, reading, weights: Some(weights.to_owned()) }
    }

    #[test]
    fn a_metric_is_loaded_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("own.safetensors");
        let metric = alex(&file);
        let error = load_metric(&metric, SHAPE, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("own.safetensors") && error.contains("fetch lpips --net alex"), "{error}");
        assert!(missing_weights(&metric).is_some());

        let (spec, _) = metric.lpips().unwrap();
        let mut tensors = Lpips::random(spec, 0, Device::Cpu).unwrap().params().snapshot();
        tensors.retain(|name, _| name.starts_with("features."));
        convert(tensors, spec.net).unwrap().write(&file).unwrap();
        assert!(missing_weights(&metric).is_none());
        let loaded = load_metric(&metric, SHAPE, Device::Cpu).unwrap().unwrap();
        let stand_in = stand_in(&metric, SHAPE, Device::Cpu).unwrap().unwrap();
        let images = |value: f64| Tensor::full([2, 1, 32, 32], value, (Kind::Float, Device::Cpu));
        // The file holds what the stand-in starts from.
        let [a, b] = [&loaded, &stand_in].map(|d| d.between(&images(0.0), &images(0.5)));
        assert!(a.equal(&b) && a.min().double_value(&[]) > 0.0, "{a} {b}");

        std::fs::write(&file, "torn").unwrap();
        let error = format!("{:#}", load_metric(&metric, SHAPE, Device::Cpu).unwrap_err());
        assert!(error.contains("train.metric") && error.contains("own.safetensors"), "{error}");
    }

    #[test]
    fn other_metrics_need_nothing_and_small_images_are_refused() {
        assert!(load_metric(&Metric::L2, SHAPE, Device::Cpu).unwrap().is_none());
        assert!(stand_in(&Metric::L2, SHAPE, Device::Cpu).unwrap().is_none());
        assert!(missing_weights(&Metric::L2).is_none());
        let small = ImageShape::square(1, 8);
        let metric = alex(std::path::Path::new("x"));
        for result in [load_metric(&metric, small, Device::Cpu), stand_in(&metric, small, Device::Cpu)] {
            let error = format!("{:#}", result.unwrap_err());
            assert!(error.contains("train.metric") && error.contains("31×31"), "{error}");
        }
        assert!(check(&metric, small).is_err() && check(&Metric::L1, small).is_ok());
    }
}
