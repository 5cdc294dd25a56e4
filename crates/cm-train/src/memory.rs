use std::fmt;

use cm_model::Params;
use cm_torch::device;
use tch::{Device, Tensor};

use crate::{Result, TrainSpec};

/// Bytes that training needs, by what they are for. It leaves out what libtorch itself occupies and the scratch
/// memory of single operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryModel {
    /// Weights and buffers, float32.
    pub weights: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimiser's two moments.
    pub moments: u64,
    /// All averages of the weights.
    pub averages: u64,
    /// The target network.
    pub target: u64,
    /// The teacher, taken to be a network like the student.
    pub teacher: u64,
    /// Copies of the weights in autocast's dtype while a network runs.
    pub casts: u64,
    /// What the forward passes of student and metric keep for the backward pass, for one image; see
    /// [`measure_activations`].
    pub activations_per_image: Option<u64>,
    /// Images that go through the network at once.
    pub micro_batch: u64,
}

impl MemoryModel {
    /// The model of a network with these parameters; `autocast` says whether it runs in a dtype of 16 bits.
    pub fn new(params: &Params, spec: &TrainSpec, autocast: bool) -> Self {
        let bytes = |t: &Tensor| t.numel() as u64 * t.kind().elt_size_in_bytes() as u64;
        let weights = params.iter().map(|(_, t)| bytes(t)).sum();
        let trained: u64 = params.trainable().map(|(_, t)| bytes(t)).sum();
        Self {
            weights,
            gradients: trained,
            moments: 2 * trained,
            averages: spec.emas.len() as u64 * trained,
            target: if spec.target.has_network() { weights } else { 0 },
            teacher: if spec.teacher.is_some() { weights } else { 0 },
            casts: if autocast { trained / 2 } else { 0 },
            activations_per_image: None,
            micro_batch: spec.micro_batch() as u64,
        }
    }

    /// What a run needs whatever its micro-batch is.
    pub fn fixed(&self) -> u64 {
        let networks = self.weights + self.target + self.teacher;
        networks + self.gradients + self.moments + self.averages + self.casts
    }

    /// What it needs in all; `None` as long as the activations are not known.
    pub fn total(&self) -> Option<u64> {
        Some(self.fixed() + self.activations_per_image? * self.micro_batch)
    }
}

impl fmt::Display for MemoryModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimiser moments", self.moments),
            ("weight averages", self.averages),
            ("target network", self.target),
            ("teacher", self.teacher),
            ("16-bit copies", self.casts),
        ];
        for (name, bytes) in rows {
            writeln!(f, "{name:<26}{:>10}", gigabytes(bytes))?;
        }
        match (self.activations_per_image, self.total()) {
            (Some(one), Some(total)) => {
                let name = format!("activations, {} image(s)", self.micro_batch);
                writeln!(f, "{name:<26}{:>10}", gigabytes(one * self.micro_batch))?;
                write!(f, "{:<26}{:>10}", "sum", gigabytes(total))
            }
            _ => write!(f, "{:<26}{:>10}  (activations not measured)", "sum", gigabytes(self.fixed())),
        }
    }
}

/// Bytes as gigabytes (10⁹) with two digits, as in `0.23 GB`.
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

/// Bytes that a forward pass keeps as long as its result, and with it the graph, is alive. Run it on one image.
///
/// On CUDA the allocator is asked, and on the CPU [`device::tensor_bytes`], where the program keeps its memory. Else it is
/// the growth of the process, which misses what earlier work had already obtained from the system: measure first thing,
/// right behind building the network.
///
/// # Errors
/// What `forward` returns, or [`crate::Error::Backend`] where the system does not tell.
pub fn measure_activations(device: Device, forward: impl FnOnce() -> Result<Tensor>) -> Result<u64> {
    let now = || match device::tensor_bytes().filter(|_| device == Device::Cpu) {
        Some(bytes) => Ok(bytes),
        None => device::memory(device).map(|memory| memory.current),
    };
    let before = now()?;
    let result = forward()?;
    let after = now()?;
    drop(result);
    Ok(after.saturating_sub(before))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::Trainable;
    use crate::testing::{mlp, spec};

    #[test]
    fn the_parts_add_up() {
        let model = mlp(0, 0.0);
        let params = model.params();
        let mut memory = MemoryModel::new(params, &spec(), true);
        let trained = 4 * params.num_parameters() as u64;
        assert!(memory.weights > trained, "buffers count");
        assert_eq!((memory.gradients, memory.moments, memory.casts), (trained, 2 * trained, trained / 2));
        assert_eq!(memory.averages, trained * spec().emas.len() as u64);
        assert_eq!((memory.target, memory.teacher), (memory.weights, 0));
        assert_eq!(memory.total(), None);
        memory.activations_per_image = Some(1000);
        assert_eq!(memory.total(), Some(memory.fixed() + 1000 * memory.micro_batch));
        let teacher = Some(crate::TeacherRule { solver: crate::TeacherSolver::Heun });
        let taught = MemoryModel::new(params, &crate::TrainSpec { teacher, ..spec() }, true);
        assert_eq!(taught.fixed(), memory.fixed() + memory.weights);
        let table = memory.to_string();
        assert!(table.contains("target network") && table.lines().count() == 9, "{table}");
    }

    #[test]
    fn what_a_result_keeps_is_seen() {
        let bytes = 64 << 20;
        let kept = measure_activations(Device::Cpu, || {
            Ok(Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu)) + 1.0)
        });
        let kept = kept.unwrap();
        assert!((bytes as u64 * 9 / 10..bytes as u64 * 2).contains(&kept), "{kept}");
    }
}
