//! Which Python the launcher is: the one that it lies beside.

use std::path::{Path, PathBuf};

/// The python executable whose environment the embedded interpreter takes: `python3.14` or `python`
/// in the launcher's own directory, else the one that the launcher was built for.
///
/// The path is not resolved further: in a virtual environment it is a link, and its `pyvenv.cfg`
/// counts for the link's place, not for what it points to.
///
/// # Errors
/// When there is neither; the text says what to do.
pub(super) fn executable() -> Result<PathBuf, String> {
    let own = own_path();
    if let Some(directory) = own.as_deref().and_then(Path::parent)
        && let Some(found) = beside(directory)
    {
        return Ok(found);
    }
    let built_for = PathBuf::from(env!("TRACTOR_HOST_BUILD_PYTHON"));
    if built_for.is_file() {
        return Ok(built_for);
    }
    let own = own.unwrap_or_else(|| "tractor-host".into());
    Err(format!(
        "there is no python3.14 beside `{}`, and the one that it was built for, `{}`, is gone; install \
         tractor-host into a virtual environment of Python 3.14",
        own.display(),
        built_for.display()
    ))
}

/// The launcher's file, with no link in the path. What the caller says (argv[0], PATH) does not count.
fn own_path() -> Option<PathBuf> {
    // A launcher that has been replaced is called `… (deleted)`; only its directory matters.
    std::env::current_exe().ok().or_else(|| {
        // Without /proc: what the kernel was given to execute.
        let given = rustix::param::linux_execfn().to_string_lossy();
        std::fs::canonicalize(given.as_ref()).ok()
    })
}

fn beside(directory: &Path) -> Option<PathBuf> {
    let exact = directory.join("python3.14");
    if exact.is_file() {
        return Some(exact);
    }
    // A plain `python` can be any version; the environment's own word has to do.
    let python = directory.join("python");
    let config = std::fs::read_to_string(directory.parent()?.join("pyvenv.cfg")).ok()?;
    (python.is_file() && config.lines().any(says_3_14)).then_some(python)
}

/// `version = 3.14.8` of venv, `version_info = 3.14.8…` of virtualenv and uv.
fn says_3_14(line: &str) -> bool {
    let Some((key, value)) = line.split_once('=') else { return false };
    matches!(key.trim(), "version" | "version_info") && {
        let value = value.trim();
        value == "3.14" || value.starts_with("3.14.")
    }
}
