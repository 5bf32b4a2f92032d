//! One line on stderr, written with one call and no lock, so that it works in a forked child and on
//! a thread that must not wait for Python.

/// Writes `tractor-host: TEXT` to stderr, if `TRACTOR_HOST_LOG` is not `off`.
pub fn line(text: std::fmt::Arguments<'_>) {
    if std::env::var_os("TRACTOR_HOST_LOG").is_some_and(|filter| filter == "off") {
        return;
    }
    let text = format!("tractor-host: {text}\n");
    // A closed or full stderr must not stop a supervisor.
    let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
}
