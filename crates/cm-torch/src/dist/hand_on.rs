use tch::{Kind, Tensor};

use super::ProcessGroup;
use crate::{Error, Result};

/// What can be handed on. A kind's place in this list goes ahead of its tensor.
const KINDS: [Kind; 4] = [Kind::Uint8, Kind::Int64, Kind::Float, Kind::Double];

impl ProcessGroup {
    /// Hands the `tensors` of rank `root` on to all ranks, which need not know how many there are, nor their shapes. On
    /// the other ranks `tensors` does not count. They go and come as tensors on the CPU.
    ///
    /// # Errors
    /// As [`broadcast`](Self::broadcast); [`Error::Value`] for tensors of other kinds than uint8, int64, float32 and
    /// float64.
    pub fn hand_on(&self, what: &str, tensors: &[Tensor], root: usize) -> Result<Vec<Tensor>> {
        if self.is_alone() {
            return Ok(tensors.iter().map(Tensor::shallow_clone).collect());
        }
        let is_root = self.rank() == root;
        let mut head = if is_root { head_of(what, tensors)? } else { Vec::new() };
        let length = Tensor::f_from_slice(&[head.len() as i64])?;
        self.broadcast(what, &length, root)?;
        head.resize(usize::try_from(length.f_int64_value(&[0])?).unwrap_or(0), 0);
        if head.is_empty() {
            return Ok(Vec::new());
        }
        let sent = Tensor::f_from_slice(&head)?;
        self.broadcast(what, &sent, root)?;
        let device = tch::Device::Cpu;
        let all = match is_root {
            true => tensors
                .iter()
                .map(|tensor| Ok(tensor.f_to_device(device)?.f_contiguous()?))
                .collect::<Result<Vec<_>>>()?,
            false => parsed(&Vec::<i64>::try_from(&sent)?)
                .into_iter()
                .map(|(kind, shape)| Ok(Tensor::f_empty(shape, (kind, device))?))
                .collect::<Result<Vec<_>>>()?,
        };
        for tensor in all.iter().filter(|tensor| tensor.numel() > 0) {
            self.broadcast(what, tensor, root)?;
        }
        Ok(all)
    }
}

/// For each tensor its kind, its number of dimensions, and these.
fn head_of(what: &str, tensors: &[Tensor]) -> Result<Vec<i64>> {
    let mut head = Vec::new();
    for tensor in tensors {
        let (kind, shape) = (tensor.kind(), tensor.size());
        let Some(place) = KINDS.iter().position(|known| *known == kind) else {
            return Err(Error::value(what, "uint8, int64, float32 or float64", format!("{kind:?}")));
        };
        head.extend([place as i64, shape.len() as i64]);
        head.extend(shape);
    }
    Ok(head)
}

fn parsed(head: &[i64]) -> Vec<(Kind, &[i64])> {
    let (mut rest, mut tensors) = (head, Vec::new());
    while let [kind, dims, more @ ..] = rest {
        let (Some(kind), Some((shape, later))) =
            (KINDS.get(*kind as usize), more.split_at_checked(*dims as usize))
        else {
            break;
        };
        tensors.push((*kind, shape));
        rest = later;
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_says_what_follows() {
        let cpu = tch::Device::Cpu;
        let tensors = [
            Tensor::zeros([2, 3], (Kind::Float, cpu)),
            Tensor::zeros([0], (Kind::Uint8, cpu)),
            Tensor::from(1.0),
        ];
        let head = head_of("x", &tensors).unwrap();
        let want: [(Kind, &[i64]); 3] =
            [(Kind::Float, &[2, 3]), (Kind::Uint8, &[0]), (tensors[2].kind(), &[])];
        assert_eq!(parsed(&head), want);
        assert_eq!(parsed(&head[..3]), [], "a head that was cut");
        let halves = [Tensor::zeros([1], (Kind::Half, cpu))];
        assert!(head_of("images", &halves).unwrap_err().to_string().contains("images"));
    }
}
