// The fingerprint of the object's sources. The build script writes it into the program, `cargo xtask cuda-object` into
// the object, and a program opens no object with another one. Both include this file.

use std::hash::Hasher;
use std::io;
use std::path::Path;

/// Sources of the object, and what they include of the shim, as paths from the package's folder.
pub const SOURCES: [&str; 3] = ["cuda/graph.cpp", "cuda/nccl.cpp", "cuda/version.cpp"];
/// Headers of this package that the sources include.
const HEADERS: [&str; 2] = ["shim/dist.h", "shim/shim.h"];

/// 16 hexadecimal digits of all sources in the package's folder.
pub fn fingerprint(package: &Path) -> io::Result<String> {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    for name in SOURCES.iter().chain(&HEADERS) {
        let text = std::fs::read(package.join(name))
            .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
        hash.write(name.as_bytes());
        hash.write(&text);
    }
    Ok(format!("{:016x}", hash.finish()))
}

/// FNV-1a: the same in every build of Rust, which the standard library's hashes need not be.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
