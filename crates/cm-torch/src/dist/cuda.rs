//! Exchanges between GPUs, through NCCL.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::ProcessGroup;
use super::group::{CONNECT, Connected, NO_LIMIT, SLICE};
use crate::shim::dist::{Connect, Group};
use crate::{Error, Result, cuda};

/// This rank's GPU and what connects it to those of the others.
#[derive(Debug)]
pub(super) struct Gpu {
    pub device: Device,
    pub group: Group,
}

/// How long giving up what a GPU waits for may hold up the end of the process.
const GIVE_UP: Duration = Duration::from_secs(5);
const WHAT: &str = "connecting the GPUs";

impl ProcessGroup {
    /// Connects this rank's GPU to those of the others, by the object that [`cuda`] opens: from then on tensors on
    /// `device` can be exchanged, through NCCL, beside those on the CPU. All ranks call it. In a group that
    /// [is alone](Self::is_alone) there is nothing to be done.
    ///
    /// c10d's own watch over NCCL, which would end the process, is switched off where the environment does not set it
    /// (`TORCH_NCCL_ASYNC_ERROR_HANDLING`, `TORCH_NCCL_ENABLE_MONITORING`, `TORCH_NCCL_RETHROW_CUDA_ERRORS`,
    /// `TORCH_NCCL_DUMP_ON_TIMEOUT`): a rank that dies or falls silent is found as on CPUs.
    ///
    /// # Errors
    /// [`Error::CudaObject`] without the object, [`Error::DeviceMissing`] without CUDA's libraries; [`Error::Value`] for a
    /// device that is no GPU, or a second one; [`Error::Rank`] and [`Error::Exchange`] if the GPUs cannot be connected,
    /// as where two ranks use one.
    pub fn use_cuda(&self, device: Device) -> Result<()> {
        let Some(connected) = &self.connected else { return Ok(()) };
        match connected.gpu.get() {
            Some(gpu) if gpu.device == device => return Ok(()),
            Some(gpu) => {
                let expected = format!("{:?}, which is connected already", gpu.device);
                return Err(Error::value(WHAT, expected, format!("{device:?}")));
            }
            None => {}
        }
        let Device::Cuda(index) = device else {
            return Err(Error::value(WHAT, "a CUDA device", format!("{device:?}")));
        };
        let object = cuda::object()?;
        let prefix = format!("{}nccl", connected.prefix);
        let how = Connect {
            prefix: &prefix,
            rank: self.rank(),
            size: self.size(),
            address: None,
            interface: None,
            within: CONNECT,
            timeout: NO_LIMIT,
        };
        let failed = |error: Error| Error::Exchange { during: WHAT.to_owned(), cause: error.to_string() };
        let group = Group::open_nccl(object, &connected.store, &how, index).map_err(failed)?;
        // NCCL connects without a limit: only when all ranks are here, and watched by this one.
        self.barrier(WHAT)?;
        let group = connected.first_exchange(group, device, self.size())?;
        // It was empty above, and this thread alone fills it.
        let _ = connected.gpu.set(Gpu { device, group });
        self.barrier(WHAT)
    }
}

impl Connected {
    /// Adds up a 1 of every rank on a thread of its own, since the call itself waits for all connections.
    fn first_exchange(&self, group: Group, device: Device, ranks: usize) -> Result<Group> {
        let failed = |cause: String| Error::Exchange { during: WHAT.to_owned(), cause };
        let (send, receive) = mpsc::channel();
        let first = move || {
            let sum = add_up_ones(&group, device);
            // If nobody listens, this rank has given up, and the process is about to end.
            let _ = send.send((group, sum));
        };
        let spawned = thread::Builder::new().name("gpus".into()).spawn(first);
        spawned.map_err(|source| Error::Io { what: "starting a thread".into(), source })?;
        let began = Instant::now();
        loop {
            match receive.recv_timeout(SLICE) {
                Ok((group, Ok(sum))) if sum == ranks as f64 => return Ok(group),
                Ok((_, Ok(sum))) => return Err(failed(format!("the sum of {ranks} ones came out as {sum}"))),
                Ok((_, Err(error))) => {
                    return Err(self.watch.inquest().unwrap_or_else(|| failed(error.to_string())));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(failed("its thread ended".to_owned())),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(error) = self.watch.fault() {
                return Err(error);
            }
            if began.elapsed() > CONNECT {
                let seconds = CONNECT.as_secs();
                return Err(failed(format!(
                    "not done within {seconds} s; NCCL_DEBUG=INFO shows how far NCCL came"
                )));
            }
        }
    }
}

fn add_up_ones(group: &Group, device: Device) -> Result<f64> {
    let one = Tensor::f_ones([1], (Kind::Float, device))?;
    let work = group.all_reduce(&one)?;
    while !work.wait(SLICE)? {}
    Ok(one.f_double_value(&[0])?)
}

/// Gives up what is under way on the GPU, within a few seconds: a kernel that waits for ranks that are gone would hold up
/// the end of the process.
pub(super) fn give_up(gpu: Gpu) {
    let (send, receive) = mpsc::channel();
    let abort = move || {
        // It failed before; closing it would wait for what does not come.
        let _ = gpu.group.abort();
        std::mem::forget(gpu);
        let _ = send.send(());
    };
    if thread::Builder::new().name("gpus".into()).spawn(abort).is_ok() {
        let _ = receive.recv_timeout(GIVE_UP);
    }
}
