//! A terminal as a full screen: keys one by one, its size, and everything as it was afterwards.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};

use crate::error::{Error, Result};

/// What a full screen is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Keys, as the terminal sends them.
    Keys(Vec<u8>),
    /// This program was asked to end, by this signal.
    Signal(i32),
    /// The screen has to be drawn anew: it has another size, or was another program's meanwhile.
    Redraw,
    /// Nothing, for as long as was asked.
    Quiet,
    /// There is no terminal any more.
    Gone,
}

/// The terminal of stdin and stdout as a full screen, while this lives.
#[derive(Debug)]
pub struct Screen {
    before: Termios,
    signals: Signals,
}

/// To the other screen, with no cursor and no wrapping; and back.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J\x1b[H";
const LEAVE: &[u8] = b"\x1b[?7h\x1b[?25h\x1b[?1049l";

impl Screen {
    /// Takes it over.
    ///
    /// # Errors
    /// When stdin and stdout are no terminal.
    pub fn open() -> Result<Self> {
        let failed = |errno: Errno| Error::os("use the terminal", errno);
        let before = rustix::termios::tcgetattr(rustix::stdio::stdin()).map_err(failed)?;
        rustix::termios::tcgetwinsize(rustix::stdio::stdout()).map_err(failed)?;
        let screen = Self { before, signals: Signals::block()? };
        screen.enter().map_err(failed)?;
        Ok(screen)
    }

    fn enter(&self) -> rustix::io::Result<()> {
        let mut raw = self.before.clone();
        // Ctrl-C and Ctrl-Z stay signals.
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &raw)?;
        put(ENTER)
    }

    fn leave(&self) {
        // A terminal that is gone needs nothing given back.
        let _ = put(LEAVE);
        let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.before);
    }

    /// Shows these lines, which are not longer than it is wide.
    ///
    /// # Errors
    /// EIO when it is gone.
    pub fn draw(&self, lines: &[String]) -> Result<()> {
        let mut text = String::from("\x1b[H");
        for (index, line) in lines.iter().enumerate() {
            if index > 0 {
                text.push_str("\r\n");
            }
            text.push_str(line);
            // The rest of the line.
            text.push_str("\x1b[0m\x1b[K");
        }
        text.push_str("\x1b[J");
        put(text.as_bytes()).map_err(|errno| Error::os("write to the terminal", errno))
    }

    /// Waits for something to do, until the deadline.
    ///
    /// # Errors
    /// None is known.
    pub fn wait_until(&self, deadline: Instant) -> Result<Event> {
        loop {
            let left = super::thread::timespec(deadline.saturating_duration_since(Instant::now()));
            let stdin = rustix::stdio::stdin();
            let mut ready =
                [PollFd::new(&self.signals.fd, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
            match rustix::event::poll(&mut ready, Some(&left)) {
                Ok(0) => return Ok(Event::Quiet),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Error::os("wait for a key", errno)),
            }
            let [signal, key] = ready.map(|fd| !fd.revents().is_empty());
            if signal && let Some(number) = self.signals.next() {
                match number {
                    libc::SIGWINCH => return Ok(Event::Redraw),
                    libc::SIGCONT => {
                        // Who had the terminal meanwhile may have left it otherwise.
                        self.enter().map_err(|errno| Error::os("use the terminal", errno))?;
                        return Ok(Event::Redraw);
                    }
                    libc::SIGTSTP => {
                        self.leave();
                        // It ends when somebody continues this process.
                        let _ = rustix::process::kill_process(
                            rustix::process::getpid(),
                            rustix::process::Signal::STOP,
                        );
                        // The signal that did so comes next.
                        continue;
                    }
                    number => return Ok(Event::Signal(number)),
                }
            }
            if key {
                let mut bytes = [0; 64];
                return Ok(match rustix::io::read(stdin, &mut bytes) {
                    Ok(0) => Event::Gone,
                    Ok(count) => Event::Keys(bytes[..count].to_vec()),
                    Err(Errno::INTR | Errno::AGAIN) => continue,
                    Err(_) => Event::Gone,
                });
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Columns and rows of the terminal that stdout is; `None` when it is none.
pub fn size() -> Option<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    // Some have none; then they are as terminals were.
    let or = |number: u16, usual| if number == 0 { usual } else { usize::from(number) };
    Some((or(size.ws_col, 80), or(size.ws_row, 24)))
}

/// Waits for one of the signals that end a program, at the longest for this time, and says which it was.
pub fn wait_for_signal(signals: &Signals, period: Duration) -> Option<i32> {
    let left = super::thread::timespec(period);
    // An error: a signal that is none of these; the caller comes again.
    let ready = rustix::event::poll(&mut [PollFd::new(&signals.fd, PollFlags::IN)], Some(&left));
    signals.next().filter(|number| ready == Ok(1) && ![libc::SIGWINCH, libc::SIGCONT].contains(number))
}

/// Signals that are read, and not delivered. For a program with one thread that has just been started.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// From now on.
    ///
    /// # Errors
    /// EMFILE.
    pub fn block() -> Result<Self> {
        const READ: [libc::c_int; 7] = [
            libc::SIGINT,
            libc::SIGTERM,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGTSTP,
            libc::SIGWINCH,
            libc::SIGCONT,
        ];
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises what it is given, and the numbers are valid.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for number in READ {
                libc::sigaddset(set.as_mut_ptr(), number);
            }
            set.assume_init()
        };
        // SAFETY: the set is initialised; a null old set is allowed.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let made = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if made < 0 {
            return Err(Error::os("read signals", std::io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(made) };
        Ok(Self { fd: super::fd::above_stdio(fd)? })
    }

    fn next(&self) -> Option<i32> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes one such structure, or fails.
        let count = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        // SAFETY: plain numbers, all of which were written.
        (count == size as isize).then(|| unsafe { info.assume_init() }.ssi_signo.cast_signed())
    }
}

fn put(mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(rustix::stdio::stdout(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
