//! What the kernel counts of its out-of-memory killer, as it writes it.

use std::path::{Path, PathBuf};

use _native::sys::oom::{Layout, Mount, parse_count};

const HYBRID: &str = "\
23 1 254:0 / / rw,noatime - ext4 /dev/root rw
31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/4f /sys/fs/cgroup/the\\040memory rw shared:3 master:4 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";
const UNIFIED: &str =
    "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";

fn mount(root: &str, point: &str) -> Mount {
    Mount { root: root.into(), point: point.into() }
}

fn anything(_: &Path) -> bool {
    true
}

#[test]
fn mounts_are_found_where_they_are() {
    let memory = Some(mount("/docker/4f", "/sys/fs/cgroup/the memory"));
    let unified = Some(mount("/", "/sys/fs/cgroup/unified"));
    assert_eq!(Layout::parse(HYBRID), Layout { memory, unified });
    let unified = Some(mount("/", "/sys/fs/cgroup"));
    assert_eq!(Layout::parse(UNIFIED), Layout { memory: None, unified });
    for text in
        ["", "\n", "no mounts\n", "1 2 3:4 - cgroup2\n", "29 23 0:26 / /x rw\n", " - cgroup cgroup memory"]
    {
        assert_eq!(Layout::parse(text), Layout::default(), "{text:?}");
    }
}

#[test]
fn the_counter_is_that_of_the_memory_controller() {
    let hybrid = Layout::parse(HYBRID);
    let membership = "9:name=systemd:/x\n5:cpu,cpuacct:/docker/4f\n4:memory:/docker/4f/in:ner\n0::/x\n";
    let found = hybrid.counter_file(membership, anything);
    assert_eq!(found, Some("/sys/fs/cgroup/the memory/in:ner/memory.oom_control".into()));
    assert_eq!(hybrid.counter_file(membership, |_| false), None);
    // Without version 1 in charge of it, version 2 is.
    let found = hybrid.counter_file("9:name=systemd:/x\n0::/x\n", anything);
    assert_eq!(found, Some("/sys/fs/cgroup/unified/x/memory.events.local".into()));
}

#[test]
fn where_it_is_not_enabled_the_next_cgroup_above_counts() {
    let layout = Layout::parse(UNIFIED);
    let only = |there: &'static str| move |path: &Path| path == Path::new(there);
    let found = |there| layout.counter_file("0::/a/b/c\n", only(there));
    for there in ["/sys/fs/cgroup/a/b/c/memory.events.local", "/sys/fs/cgroup/a/b/c/memory.events"] {
        assert_eq!(found(there), Some(PathBuf::from(there)));
    }
    assert_eq!(found("/sys/fs/cgroup/a/memory.events"), Some("/sys/fs/cgroup/a/memory.events".into()));
    assert_eq!(found("/sys/fs/memory.events"), None, "outside of the mount");
}

#[test]
fn a_cgroup_that_cannot_be_seen_from_here_has_no_counter() {
    let hybrid = Layout::parse(HYBRID);
    for membership in [
        "4:memory:/",
        "4:memory:/docker/4f2",
        "4:memory:/docker/4f/gone (deleted)",
        "4:memory:/docker/4f/../../other",
        "4:memory",
        "memory",
        "",
    ] {
        assert_eq!(hybrid.counter_file(membership, anything), None, "{membership:?}");
    }
    assert_eq!(Layout::default().counter_file("4:memory:/\n0::/\n", anything), None);
}

#[test]
fn counts_are_those_of_kills_and_of_nothing_else() {
    let events = "low 0\nhigh 3\nmax 7\noom 5\noom_kill 2\noom_group_kill 1\n";
    assert_eq!(parse_count(events), Some(2));
    assert_eq!(parse_count("oom_kill_disable 0\nunder_oom 1\noom_kill 3\n"), Some(3));
    assert_eq!(parse_count("pgmajfault 4\noom_kill 18446744073709551615"), Some(u64::MAX));
    for text in
        ["", "oom 5\n", "oom_kill_disable 0\nunder_oom 0\n", "oom_kill\n", "oom_kill x\n", "oom_kill -1\n"]
    {
        assert_eq!(parse_count(text), None, "{text:?}");
    }
}
