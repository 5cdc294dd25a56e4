//! The border to `shim/dist.cpp`.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::time::Duration;

use tch::Tensor;
use torch_sys::C_tensor;

use super::cuda::Object;
use super::{check, take_string};
use crate::{Error, Result};

unsafe extern "C" {
    fn cm_store_open(
        host: *const c_char,
        port: u16,
        server: bool,
        timeout_ms: i64,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_store_close(store: *mut c_void);
    fn cm_store_set(store: *mut c_void, key: *const c_char, data: *const u8, size: usize) -> *mut c_char;
    fn cm_store_check(store: *mut c_void, key: *const c_char, there: *mut bool) -> *mut c_char;
    fn cm_store_count(store: *mut c_void, key: *const c_char, count: *mut i64) -> *mut c_char;
    fn cm_store_get(
        store: *mut c_void,
        keys: *const *const c_char,
        n: usize,
        text: *mut *mut c_char,
    ) -> *mut c_char;

    fn cm_group_open(
        store: *mut c_void,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        address: *const c_char,
        card: *const c_char,
        connect_ms: i64,
        timeout_ms: i64,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_group_close(group: *mut c_void);
    fn cm_group_abort(group: *mut c_void) -> *mut c_char;
    fn cm_group_all_reduce(
        group: *mut c_void,
        tensor: *const C_tensor,
        work: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_group_broadcast(
        group: *mut c_void,
        tensor: *const C_tensor,
        root: c_int,
        work: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_group_all_gather(
        group: *mut c_void,
        own: *const C_tensor,
        all: *const C_tensor,
        work: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_group_gather(
        group: *mut c_void,
        own: *const C_tensor,
        all: *const C_tensor,
        root: c_int,
        work: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_group_scatter(
        group: *mut c_void,
        own: *const C_tensor,
        all: *const C_tensor,
        root: c_int,
        work: *mut *mut c_void,
    ) -> *mut c_char;
    fn cm_work_wait(work: *mut c_void, wait_ms: i64, done: *mut bool) -> *mut c_char;
    fn cm_work_free(work: *mut c_void);
}

fn text(value: &str) -> Result<CString> {
    CString::new(value).map_err(|_| Error::value("text for the store", "no byte 0", format!("{value:?}")))
}

fn milliseconds(time: Duration) -> i64 {
    // The shim reads 0 as no limit.
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// What a function of the shim made, which is never null if it says that all is well.
fn made(pointer: *mut c_void) -> Result<NonNull<c_void>> {
    NonNull::new(pointer).ok_or_else(|| Error::Cpp { text: "an object of c10d was not made".to_owned() })
}

/// A client of c10d's store, and on one rank the store itself.
#[derive(Debug)]
pub(crate) struct Store(NonNull<c_void>);

// SAFETY: the handle is a counted pointer that is this value's alone, and a store locks itself for every request.
unsafe impl Send for Store {}

impl Store {
    /// Connects to the store at `host`:`port`, which `server` makes first.
    pub(crate) fn open(host: &str, port: u16, server: bool, timeout: Duration) -> Result<Self> {
        let (host, mut out) = (text(host)?, std::ptr::null_mut());
        // SAFETY: the text lives through the call, which writes one pointer on success.
        check(unsafe { cm_store_open(host.as_ptr(), port, server, milliseconds(timeout), &mut out) })?;
        made(out).map(Self)
    }

    pub(crate) fn set(&self, key: &str, value: &str) -> Result<()> {
        let key = text(key)?;
        // SAFETY: key and value live through the call, which copies them.
        check(unsafe { cm_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Whether there is such a key.
    pub(crate) fn has(&self, key: &str) -> Result<bool> {
        let (key, mut there) = (text(key)?, false);
        // SAFETY: the key lives through the call, which writes one flag.
        check(unsafe { cm_store_check(self.0.as_ptr(), key.as_ptr(), &mut there) })?;
        Ok(there)
    }

    /// Adds 1 to a counter and returns what it is then.
    pub(crate) fn count(&self, key: &str) -> Result<i64> {
        let (key, mut count) = (text(key)?, 0);
        // SAFETY: the key lives through the call, which writes one number.
        check(unsafe { cm_store_count(self.0.as_ptr(), key.as_ptr(), &mut count) })?;
        Ok(count)
    }

    /// The values of keys that are there, none of which holds a line break.
    pub(crate) fn get(&self, keys: &[String]) -> Result<Vec<String>> {
        let keys = keys.iter().map(|key| text(key)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<*const c_char> = keys.iter().map(|key| key.as_ptr()).collect();
        let mut out = std::ptr::null_mut();
        // SAFETY: the keys live through the call; on success `out` is a heap string of the shim that is ours.
        let all = unsafe {
            check(cm_store_get(self.0.as_ptr(), pointers.as_ptr(), pointers.len(), &mut out))?;
            take_string(out).unwrap_or_default()
        };
        Ok(all.lines().map(str::to_owned).collect())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `cm_store_open` and is not used again.
        unsafe { cm_store_close(self.0.as_ptr()) }
    }
}

/// How a group of ranks is connected.
pub(crate) struct Connect<'a> {
    pub prefix: &'a str,
    pub rank: usize,
    pub size: usize,
    /// The address to listen on; what this machine's name stands for if there is none.
    pub address: Option<&'a str>,
    /// The network interface to listen on.
    pub interface: Option<&'a str>,
    /// Limit for connecting.
    pub within: Duration,
    /// Limit for each exchange.
    pub timeout: Duration,
}

/// Ranks connected by one of c10d's backends.
#[derive(Debug)]
pub(crate) struct Group(NonNull<c_void>);

// SAFETY: the handle is a counted pointer that is this value's alone, and a group belongs to no thread.
unsafe impl Send for Group {}

impl Group {
    /// Connects the ranks by Gloo, for tensors on the CPU.
    pub(crate) fn open(store: &Store, how: &Connect<'_>) -> Result<Self> {
        let number = |value: usize| c_int::try_from(value).unwrap_or(c_int::MAX);
        let prefix = text(how.prefix)?;
        let (address, card) = (how.address.map(text).transpose()?, how.interface.map(text).transpose()?);
        let pointer = |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
        let mut out = std::ptr::null_mut();
        // SAFETY: the texts live through the call, which writes one pointer on success.
        check(unsafe {
            cm_group_open(
                store.0.as_ptr(),
                prefix.as_ptr(),
                number(how.rank),
                number(how.size),
                pointer(&address),
                pointer(&card),
                milliseconds(how.within),
                milliseconds(how.timeout),
                &mut out,
            )
        })?;
        made(out).map(Self)
    }

    /// Prepares NCCL, for tensors on the GPU of index `device`; the first exchange connects the ranks.
    pub(crate) fn open_nccl(
        object: &Object,
        store: &Store,
        how: &Connect<'_>,
        device: usize,
    ) -> Result<Self> {
        let prefix = text(how.prefix)?;
        let mut out = std::ptr::null_mut();
        // SAFETY: the object was built from sources that declare the function so, against this libtorch; store and
        // text live through the call, which keeps a counted pointer on the one and copies the other.
        check(unsafe {
            (object.nccl_open)(
                store.0.as_ptr(),
                prefix.as_ptr(),
                how.rank as c_int,
                how.size as c_int,
                device as c_int,
                milliseconds(how.timeout),
                &mut out,
            )
        })?;
        made(out).map(Self)
    }

    /// Gives up the exchanges that are under way.
    pub(crate) fn abort(&self) -> Result<()> {
        // SAFETY: the group is alive.
        check(unsafe { cm_group_abort(self.0.as_ptr()) })
    }

    /// Starts adding up `tensor`, which is contiguous, over all ranks, in place.
    pub(crate) fn all_reduce(&self, tensor: &Tensor) -> Result<Work> {
        let mut out = std::ptr::null_mut();
        // SAFETY: the tensor outlives the call, and the exchange holds a handle of its own on it.
        check(unsafe { cm_group_all_reduce(self.0.as_ptr(), tensor.as_ptr(), &mut out) })?;
        made(out).map(Work)
    }

    /// Starts copying `tensor`, which is contiguous, from rank `root` to all others.
    pub(crate) fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work> {
        let mut out = std::ptr::null_mut();
        // SAFETY: as in `all_reduce`.
        check(unsafe { cm_group_broadcast(self.0.as_ptr(), tensor.as_ptr(), root as c_int, &mut out) })?;
        made(out).map(Work)
    }

    /// Starts collecting `own` of every rank, rank by rank, in `all` of every rank. Both are contiguous, and `all` has
    /// as many elements as all ranks together.
    pub(crate) fn all_gather(&self, own: &Tensor, all: &Tensor) -> Result<Work> {
        let mut out = std::ptr::null_mut();
        // SAFETY: as in `all_reduce`.
        check(unsafe { cm_group_all_gather(self.0.as_ptr(), own.as_ptr(), all.as_ptr(), &mut out) })?;
        made(out).map(Work)
    }

    /// [`all_gather`](Self::all_gather) on rank `root` alone, where alone there is an `all`.
    pub(crate) fn gather(&self, own: &Tensor, all: Option<&Tensor>, root: usize) -> Result<Work> {
        let (all, mut out) = (all.map_or(std::ptr::null(), Tensor::as_ptr), std::ptr::null_mut());
        // SAFETY: as in `all_reduce`.
        check(unsafe { cm_group_gather(self.0.as_ptr(), own.as_ptr(), all, root as c_int, &mut out) })?;
        made(out).map(Work)
    }

    /// Starts handing every rank its part of `all` of rank `root`, the way back of [`gather`](Self::gather).
    pub(crate) fn scatter(&self, own: &Tensor, all: Option<&Tensor>, root: usize) -> Result<Work> {
        let (all, mut out) = (all.map_or(std::ptr::null(), Tensor::as_ptr), std::ptr::null_mut());
        // SAFETY: as in `all_reduce`.
        check(unsafe { cm_group_scatter(self.0.as_ptr(), own.as_ptr(), all, root as c_int, &mut out) })?;
        made(out).map(Work)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `cm_group_open` and is not used again.
        unsafe { cm_group_close(self.0.as_ptr()) }
    }
}

/// An exchange that is under way.
#[derive(Debug)]
pub(crate) struct Work(NonNull<c_void>);

impl Work {
    /// Waits for `time` at most, and says whether the exchange has come to its end.
    pub(crate) fn wait(&self, time: Duration) -> Result<bool> {
        let mut done = false;
        // SAFETY: the work is alive; the call writes one flag.
        check(unsafe { cm_work_wait(self.0.as_ptr(), milliseconds(time), &mut done) })?;
        Ok(done)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim and is not used again.
        unsafe { cm_work_free(self.0.as_ptr()) }
    }
}
