//! Checks the Python that is built for, and links the launcher and the tests with its shared
//! libpython, its dynamic linker and an rpath. The extension module is linked with none of them:
//! it takes its symbols from the interpreter that imports it.

use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        fail("tractor-host runs on Linux only: it is built on pidfd, futex and /proc");
    }
    let config = pyo3_build_config::get();
    let version = config.version();
    if (version.major, version.minor) != (3, 14) {
        fail(&format!(
            "tractor-host needs CPython 3.14, this is {}; set PYO3_PYTHON to a python3.14",
            version
        ));
    }
    if config.is_free_threaded() {
        fail("tractor-host needs the GIL build of CPython 3.14, this is the free-threaded one");
    }
    let Some(python) = config.executable().map(PathBuf::from) else {
        fail("the Python interpreter to build for is not known; set PYO3_PYTHON")
    };
    println!("cargo:rustc-env=TRACTOR_HOST_BUILD_PYTHON={}", python.display());
    println!("cargo:rerun-if-changed={}", python.display());

    let lib_dir = config.lib_dir().map(str::to_owned).unwrap_or_default();
    let lib_name = config.lib_name().map(str::to_owned).unwrap_or_default();
    let library = Path::new(&lib_dir).join(format!("lib{lib_name}.so"));
    if !library.exists() {
        fail(&format!(
            "{} has no shared libpython at {}, which the launcher embeds; use a Python built with \
             --enable-shared (on Debian: install libpython3.14-dev)",
            python.display(),
            library.display()
        ));
    }
    for kind in ["bins", "tests"] {
        let arg = |text: String| println!("cargo:rustc-link-arg-{kind}={text}");
        if let Some(loader) = dynamic_linker(&python) {
            arg(format!("-Wl,--dynamic-linker={loader}"));
        }
        // DT_RPATH, not DT_RUNPATH: it also serves what libpython and its extensions load.
        arg(format!("-Wl,--disable-new-dtags,-rpath,{lib_dir}"));
        // libpython may need a newer libc than the one that we link against.
        arg("-Wl,--allow-shlib-undefined".into());
        arg(format!("-L{lib_dir}"));
        arg(format!("-l{lib_name}"));
        // Extension modules that Python loads look their C-API symbols up in the executable's scope.
        arg("-Wl,--no-as-needed".into());
    }
}

/// The dynamic linker (PT_INTERP) that the interpreter itself runs under, where it is a 64-bit ELF.
fn dynamic_linker(python: &Path) -> Option<String> {
    let data = std::fs::read(std::fs::canonicalize(python).ok()?).ok()?;
    let header = FileHeader64::<Endianness>::parse(&*data).ok()?;
    let endian = header.endian().ok()?;
    let segments = header.program_headers(endian, &*data).ok()?;
    let segment = segments.iter().find(|s| s.p_type(endian) == PT_INTERP)?;
    let path = segment.data(endian, &*data).ok()?;
    let path = path.split(|b| *b == 0).next()?;
    Some(String::from_utf8_lossy(path).into_owned())
}

fn fail(message: &str) -> ! {
    println!("cargo:error={message}");
    std::process::exit(1);
}
