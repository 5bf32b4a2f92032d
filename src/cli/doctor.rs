//! `doctor`: whether this machine has what tractor-host needs, found out by using it, and what each missing thing
//! costs.

mod machine;

use std::process::{Command, Stdio};

use serde::Serialize;

use super::{complain, print, python};

/// What is missing can be done without. Also: the answer could not be given.
const DEGRADED: i32 = 1;
/// It can't be used.
const UNUSABLE: i32 = 2;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    Degraded,
    Unusable,
}

/// What was looked at, and what came of it.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    verdict: Verdict,
    /// Good to know; or what is missing.
    what: String,
    /// What one has to do without for that.
    cost: Option<String>,
}

impl Finding {
    fn good(name: &'static str, what: String) -> Self {
        Self { name, verdict: Verdict::Good, what, cost: None }
    }

    fn or_unusable(name: &'static str, found: Result<String, String>, cost: &str) -> Self {
        Self::or(Verdict::Unusable, name, found, cost)
    }

    fn or_degraded(name: &'static str, found: Result<String, String>, cost: &str) -> Self {
        Self::or(Verdict::Degraded, name, found, cost)
    }

    fn or(verdict: Verdict, name: &'static str, found: Result<String, String>, cost: &str) -> Self {
        match found {
            Ok(what) => Self::good(name, what),
            Err(what) => Self { name, verdict, what, cost: Some(cost.to_owned()) },
        }
    }
}

/// The document of `--json`.
#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    verdict: Verdict,
    findings: &'a [Finding],
}

/// Looks at everything, prints it, and returns the exit code: 0 when nothing is missing.
pub(super) fn examine(json: bool) -> i32 {
    let mut findings = vec![Finding::good("tractor-host", env!("CARGO_PKG_VERSION").into())];
    findings.extend(embedded_python());
    findings.extend(machine::examine());
    let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Good);
    let text = if json {
        match serde_json::to_string(&Document { version: 1, verdict, findings: &findings }) {
            Ok(text) => text + "\n",
            Err(error) => {
                complain(error);
                return DEGRADED;
            }
        }
    } else {
        text(&findings)
    };
    match (print(&text), verdict) {
        (0, Verdict::Good) => 0,
        (0, Verdict::Degraded) => DEGRADED,
        (0, Verdict::Unusable) => UNUSABLE,
        (failed, _) => failed,
    }
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut missing = Vec::new();
    for Finding { name, verdict, what, cost } in findings {
        let mark = if *verdict == Verdict::Good { "  " } else { "! " };
        text.push_str(&format!("{mark}{name:<16}{what}\n"));
        if let Some(cost) = cost {
            missing.push(*name);
            text.push_str(&format!("{:18}so: {cost}\n", ""));
        }
    }
    text.push_str(&if missing.is_empty() {
        "everything is there\n".into()
    } else {
        format!("missing: {}\n", missing.join(", "))
    });
    text
}

/// Starts the embedded Python, in a process of its own, and asks it.
fn embedded_python() -> Vec<Finding> {
    const CODE: &str = "import json, sys\n\
        told = dict(version=sys.version.split()[0], executable=sys.executable, prefix=sys.prefix)\n\
        try:\n\
        \x20   from tractor_host import __version__, __file__\n\
        \x20   told |= dict(package=__version__, file=__file__)\n\
        \x20   from tractor_host._diagnosis import of_python\n\
        \x20   told |= of_python()\n\
        except ImportError as error: told['error'] = str(error)\n\
        print(json.dumps(told))\n";
    let unusable =
        |what: String| vec![Finding::or_unusable("python", Err(what), "the launcher can't run a program")];
    let executable = match python::executable() {
        Ok(executable) => executable,
        Err(reason) => return unusable(reason),
    };
    let own = std::env::current_exe().unwrap_or_else(|_| "tractor-host".into());
    let output = Command::new(own).args(["run", "-P", "-c", CODE]).stdin(Stdio::null()).output();
    let (told, complaint) = match &output {
        Ok(output) => (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
        Err(error) => ("".into(), error.to_string().into()),
    };
    let Ok(told) = serde_json::from_str::<serde_json::Value>(&told) else {
        return unusable(format!("{} cannot be started: {}", executable.display(), complaint.trim()));
    };
    let word = |key: &str| told[key].as_str().unwrap_or("?").to_owned();
    let mut found = vec![
        Finding::good("python", format!("{}, {}", word("version"), word("executable"))),
        Finding::good("environment", word("prefix")),
        Finding::or_unusable("tractor_host", package_of(&told), "no program can import it"),
    ];
    if let Some(rungs) = told["rungs"].as_array() {
        found.push(Finding::or_degraded(
            "ladder",
            ladder_of(rungs),
            "subinterpreters that get as far are abandoned, and kept in the quarantine",
        ));
    }
    for (key, name, cost) in [
        ("layout", "layout", "no subinterpreter can be ended by force, and none lives through a fork"),
        ("own_gil", "own GIL", "`gil=\"own\"` can't be used"),
        ("preload", "preload", "the fork server starts without them"),
    ] {
        if let Some(told) = told[key].as_object() {
            let what = told.get("what").and_then(|what| what.as_str()).unwrap_or_default().to_owned();
            let good = told.get("good").and_then(|good| good.as_bool()).unwrap_or(false);
            found.push(Finding::or_degraded(name, if good { Ok(what) } else { Err(what) }, cost));
        }
    }
    found
}

/// The rungs for subinterpreters, and which are missing.
fn ladder_of(rungs: &[serde_json::Value]) -> Result<String, String> {
    let names: Vec<&str> = rungs.iter().filter_map(|pair| pair[0].as_str()).collect();
    let missing: Vec<String> = rungs
        .iter()
        .filter_map(|pair| Some(format!("`{}` is missing: {}", pair[0].as_str()?, pair[1].as_str()?)))
        .collect();
    if missing.is_empty() { Ok(names.join(", ")) } else { Err(missing.join("; ")) }
}

/// The Python package must be the launcher's own: they speak to each other.
fn package_of(told: &serde_json::Value) -> Result<String, String> {
    let own = env!("CARGO_PKG_VERSION");
    match (told["package"].as_str(), told["file"].as_str(), told["error"].as_str()) {
        (Some(version), Some(path), _) if version == own => Ok(format!("{version}, {path}")),
        (Some(version), Some(path), _) => Err(format!("{path} is version {version}, not {own}")),
        (.., error) => Err(error.unwrap_or("it tells nothing of itself").to_owned()),
    }
}
