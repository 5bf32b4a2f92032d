//! Python's objects and frames, read from outside: no GIL, no thread state, of this process or another.
//!
//! All memory is read through the kernel, which answers a bad address with an error. The structures change
//! while they are read; so what comes out is a picture that may be blurred, and every walk has a bound.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use super::lines::line_at;
use super::stacks::Frame;
use crate::ffi::offsets::{Layout, object};
use crate::ffi::walk::Walk;
use crate::sys::memory::Memory;

/// Longer than any name or path.
const MAX_TEXT: u64 = 4096;
/// As long as the line table of a very long function.
const MAX_TABLE: u64 = 1 << 20;
/// More than a container that we look into has.
const MAX_ITEMS: u64 = 1 << 16;
/// More local variables, attributes and bases than anybody has.
const MAX_NAMES: u64 = 1024;
/// The low bits of a reference on a stack are tags.
const TAGS: u64 = 3;

/// The way into a Python.
pub struct Reader {
    memory: Memory,
    /// Where things are there.
    pub at: Layout,
    codes: RefCell<HashMap<u64, Option<Rc<Code>>>>,
    names: RefCell<HashMap<u64, Option<Rc<str>>>>,
}

/// A code object.
struct Code {
    file: String,
    function: String,
    first_line: i64,
    table: Vec<u8>,
}

impl Reader {
    /// Reads that memory, which is laid out so.
    pub fn new(memory: Memory, at: Layout) -> Self {
        Self { memory, at, codes: RefCell::default(), names: RefCell::default() }
    }

    /// From its runtime to all that can be read.
    pub fn walk(&self) -> Walk<'_> {
        Walk::new(&self.memory, &self.at)
    }

    /// So many bytes from an address.
    pub fn bytes<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        self.memory.bytes(address)
    }

    fn buffer(&self, address: u64, size: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(size).ok()?];
        self.memory.read(address, &mut bytes).then_some(bytes)
    }

    /// A byte of a structure.
    pub fn byte(&self, base: u64, offset: usize) -> Option<u8> {
        self.bytes(base.checked_add(offset as u64)?).map(|[byte]| byte)
    }

    /// A word of a structure.
    pub fn word(&self, base: u64, offset: usize) -> Option<u64> {
        self.memory.word(base, offset)
    }

    /// A word that is no null pointer.
    pub fn pointer(&self, base: u64, offset: usize) -> Option<u64> {
        self.memory.pointer(base, offset)
    }

    fn words(&self, address: u64, count: u64) -> Option<Vec<u64>> {
        let bytes = self.buffer(address, count.min(MAX_ITEMS) * 8)?;
        Some(bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }

    /// The frames of a thread or a coroutine, innermost first: where each is, and the frame.
    pub fn frames(&self, innermost: Option<u64>, most: usize) -> Frames {
        /// Deeper than anybody looks for what is at the bottom.
        const MAX_STEPS: usize = 4096;
        /// As many calls as there are between a thread's first one and an event loop's, and some.
        const BOTTOM: usize = 16;
        let mut found = Frames::default();
        let mut next = innermost;
        for _ in 0..MAX_STEPS {
            let Some(frame) = next else { break };
            if let Some((code, _)) = self.code_of(frame) {
                if found.shown.len() >= most {
                    found.omitted += 1;
                    found.bottom.extend(self.frame_of(frame, &code).map(|shown| (frame, shown)));
                    if found.bottom.len() > BOTTOM {
                        found.bottom.pop_front();
                    }
                } else if let Some(shown) = self.frame_of(frame, &code) {
                    found.shown.push((frame, shown));
                }
            }
            next = self.pointer(frame, self.at.frame_previous);
        }
        found
    }

    /// A frame that is no stand-in of the interpreter's C code.
    pub fn frame(&self, frame: u64) -> Option<Frame> {
        let (code, _) = self.code_of(frame)?;
        self.frame_of(frame, &code)
    }

    fn frame_of(&self, frame: u64, code: &Code) -> Option<Frame> {
        let (_, address) = self.code_of(frame)?;
        let start = address.checked_add(self.at.code_adaptive as u64)?;
        let instruction = self.word(frame, self.at.frame_instr_ptr)?.checked_sub(start)? / 2;
        Some(Frame {
            file: code.file.clone(),
            line: line_at(&code.table, code.first_line, instruction),
            function: code.function.clone(),
        })
    }

    /// A frame's code, and where that is.
    fn code_of(&self, frame: u64) -> Option<(Rc<Code>, u64)> {
        /// Frames from here on belong to the interpreter's C code and have none of their own.
        const OWNED_BY_INTERPRETER: u8 = 3;
        if self.byte(frame, self.at.frame_owner)? >= OWNED_BY_INTERPRETER {
            return None;
        }
        let address = self.pointer(frame, self.at.frame_executable)? & !TAGS;
        let known = self.codes.borrow().get(&address).cloned();
        let code = known.unwrap_or_else(|| {
            let code = self.read_code(address).map(Rc::new);
            self.codes.borrow_mut().insert(address, code.clone());
            code
        });
        Some((code?, address))
    }

    fn read_code(&self, code: u64) -> Option<Code> {
        let first = self.bytes(code.checked_add(self.at.code_firstlineno as u64)?).map(i32::from_ne_bytes)?;
        let table = self.pointer(code, self.at.code_linetable).and_then(|table| self.bytes_object(table));
        Some(Code {
            file: self.text(self.pointer(code, self.at.code_filename)?)?,
            function: self.text(self.pointer(code, self.at.code_qualname)?)?,
            first_line: first.into(),
            table: table.unwrap_or_default(),
        })
    }

    /// The object that a local variable of a frame refers to.
    pub fn local(&self, frame: u64, name: &str) -> Option<u64> {
        let code = self.pointer(frame, self.at.frame_executable)? & !TAGS;
        let names = self.tuple_items(self.pointer(code, self.at.code_localsplusnames)?)?;
        let index = names.iter().position(|&found| self.name(found).is_some_and(|found| &*found == name))?;
        let reference = self.pointer(frame, self.at.frame_localsplus + 8 * index)?;
        Some(reference & !TAGS).filter(|object| *object != 0)
    }

    fn bytes_object(&self, object: u64) -> Option<Vec<u8>> {
        let size = self.word(object, self.at.bytes_size).filter(|size| *size <= MAX_TABLE)?;
        self.buffer(object.checked_add(self.at.bytes_value as u64)?, size)
    }

    /// A `str`, in whichever of CPython's forms it is.
    pub fn text(&self, object: u64) -> Option<String> {
        /// The size of the head of a string that is not ASCII: its UTF-8 form's length and place
        /// follow the ASCII head.
        const COMPACT_EXTRA: u64 = 16;
        let state = self.bytes(object.checked_add(self.at.unicode_state as u64)?).map(u32::from_ne_bytes)?;
        let length = self.word(object, self.at.unicode_length).filter(|length| *length <= MAX_TEXT)?;
        // CPython's bit fields: interned (2), kind (3), compact (1), ascii (1), …
        let (kind, compact, ascii) = (u64::from(state >> 2 & 7), state >> 5 & 1, state >> 6 & 1);
        if compact == 0 || !matches!(kind, 1 | 2 | 4) {
            return None;
        }
        let head = self.at.unicode_ascii_size as u64 + if ascii == 1 { 0 } else { COMPACT_EXTRA };
        let bytes = self.buffer(object.checked_add(head)?, length * kind)?;
        let chars = bytes.chunks_exact(usize::try_from(kind).ok()?).map(|unit| {
            let mut word = [0; 4];
            word[..unit.len()].copy_from_slice(unit);
            char::from_u32(u32::from_ne_bytes(word)).unwrap_or(char::REPLACEMENT_CHARACTER)
        });
        Some(chars.collect())
    }

    /// As [`Reader::text`], of one that is likely to be asked for again.
    fn name(&self, object: u64) -> Option<Rc<str>> {
        if let Some(known) = self.names.borrow().get(&object) {
            return known.clone();
        }
        let name: Option<Rc<str>> = self.text(object).map(Into::into);
        self.names.borrow_mut().insert(object, name.clone());
        name
    }

    /// What C code has written at an address, up to the first NUL.
    fn c_string(&self, address: u64) -> Option<String> {
        const PIECE: usize = 32;
        const MOST: usize = 128;
        let mut bytes = Vec::new();
        while bytes.len() < MOST {
            let next = address.checked_add(bytes.len() as u64)?;
            match self.bytes::<PIECE>(next) {
                Some(piece) => bytes.extend_from_slice(&piece),
                // The end of what is mapped is near.
                None => bytes.push(self.byte(next, 0)?),
            }
            if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
                bytes.truncate(end);
                break;
            }
        }
        String::from_utf8(bytes).ok()
    }

    /// The name of an object's type.
    pub fn type_name(&self, object: u64) -> Option<String> {
        let class = self.pointer(object, self.at.object_type)?;
        self.c_string(self.pointer(class, self.at.type_name)?)
    }

    /// An `int` that is not negative and fits 30 bits; other ones come out wrong.
    pub fn small_int(&self, object: u64) -> Option<u32> {
        self.bytes(object.checked_add(self.at.int_digits as u64)?).map(u32::from_ne_bytes)
    }

    fn tuple_items(&self, tuple: u64) -> Option<Vec<u64>> {
        let size = self.word(tuple, self.at.tuple_size)?.min(MAX_NAMES);
        self.words(tuple.checked_add(self.at.tuple_items as u64)?, size)
    }

    /// What is in a `list`.
    pub fn list_items(&self, list: u64) -> Option<Vec<u64>> {
        let size = self.word(list, self.at.list_size)?.min(MAX_ITEMS);
        if size == 0 {
            return Some(Vec::new());
        }
        self.words(self.pointer(list, self.at.list_items)?, size)
    }

    /// What is in a `set`, in no order.
    pub fn set_items(&self, set: u64) -> Option<Vec<u64>> {
        /// The hash that goes with an entry whose object has been taken out.
        const NO_HASH: u64 = u64::MAX;
        let size = self.word(set, self.at.set_mask)?.min(MAX_ITEMS) + 1;
        let table =
            self.words(self.pointer(set, self.at.set_table)?, size * (object::SET_ENTRY as u64 / 8))?;
        let entries = table.as_chunks().0.iter();
        Some(entries.filter(|[key, hash]| *key != 0 && *hash != NO_HASH).map(|[key, _]| *key).collect())
    }

    /// An attribute of an object: a slot, or in its dict. Not one of its class.
    pub fn attribute(&self, object: u64, name: &str) -> Option<u64> {
        let class = self.pointer(object, self.at.object_type)?;
        self.slot(object, class, name).or_else(|| self.in_dict(object, class, name))
    }

    fn slot(&self, object: u64, class: u64, name: &str) -> Option<u64> {
        const MOST_BASES: usize = 16;
        let mut class = Some(class);
        for _ in 0..MOST_BASES {
            let members = self.pointer(class?, object::TYPE_MEMBERS);
            for index in 0..MAX_NAMES {
                let Some(member) =
                    members.and_then(|members| members.checked_add(index * object::MEMBER_SIZE as u64))
                else {
                    break;
                };
                let Some(found) = self.pointer(member, object::MEMBER_NAME) else { break };
                if self.c_string(found)? == name {
                    let offset = self.word(member, object::MEMBER_OFFSET)?;
                    return self.pointer(object.checked_add(offset)?, 0);
                }
            }
            class = self.pointer(class?, object::TYPE_BASE);
        }
        None
    }

    fn in_dict(&self, object: u64, class: u64, name: &str) -> Option<u64> {
        let flags = self.word(class, self.at.type_flags)?;
        if flags & object::INLINE_VALUES != 0 {
            let values = object.checked_add(self.word(class, object::TYPE_BASICSIZE)?)?;
            if self.byte(values, object::VALUES_VALID)? != 0 {
                let keys = self.pointer(class, object::TYPE_CACHED_KEYS)?;
                let (index, _) = self.find_key(keys, name)?;
                return self.pointer(values, object::VALUES_FIRST + 8 * index);
            }
        }
        if flags & object::MANAGED_DICT == 0 {
            return None;
        }
        let dict = self.pointer(object.checked_sub(object::MANAGED_DICT_BEFORE)?, 0)?;
        let (index, in_keys) = self.find_key(self.pointer(dict, self.at.dict_keys)?, name)?;
        match self.pointer(dict, self.at.dict_values) {
            Some(values) => self.pointer(values, object::VALUES_FIRST + 8 * index),
            None => Some(in_keys).filter(|value| *value != 0),
        }
    }

    /// The place of a name among a dict's keys, and the value that stands beside it there.
    fn find_key(&self, keys: u64, name: &str) -> Option<(usize, u64)> {
        const GENERAL: u8 = 0;
        if self.byte(keys, object::KEYS_KIND)? == GENERAL {
            return None;
        }
        let index_bytes = 1_u64.checked_shl(self.byte(keys, object::KEYS_INDEX_SIZE)?.into())?;
        let count = self.word(keys, object::KEYS_COUNT)?.min(MAX_NAMES);
        let entries = keys.checked_add(object::KEYS_INDEX as u64)?.checked_add(index_bytes)?;
        let entries = self.words(entries, count * 2)?;
        let mut entries = entries.as_chunks().0.iter().enumerate();
        entries.find_map(|(index, [key, value])| {
            self.name(*key).filter(|found| &**found == name).map(|_| (index, *value))
        })
    }

    /// What a coroutine or generator is at, innermost first, through all that it awaits; and whether it runs
    /// just now.
    pub fn awaiting(&self, coroutine: u64, most: usize) -> (Vec<Frame>, bool) {
        /// It waits for the object on top of its stack. It runs. From here on it has ended.
        const WAITS: i8 = -1;
        const RUNS: i8 = 0;
        const ENDED: i8 = 1;
        let mut found = Vec::new();
        let mut next = Some(coroutine);
        let mut runs = false;
        for _ in 0..MAX_NAMES {
            let Some(generator) = next.take() else { break };
            let Some(state) = self.byte(generator, self.at.generator_state).map(u8::cast_signed) else {
                break;
            };
            if state >= ENDED || found.len() >= most {
                break;
            }
            let Some(frame) = generator.checked_add(self.at.generator_frame as u64) else { break };
            found.extend(self.frame(frame));
            runs = state == RUNS;
            if state == WAITS {
                let top = self.pointer(frame, self.at.frame_stackpointer).and_then(|top| top.checked_sub(8));
                next =
                    top.and_then(|top| self.pointer(top, 0)).and_then(|waits| self.generator(waits & !TAGS));
            }
        }
        found.reverse();
        (found, runs)
    }

    /// The coroutine or generator that an object is, or stands for.
    fn generator(&self, object: u64) -> Option<u64> {
        /// Where those that stand for one have it: behind the object's head.
        const INSIDE: usize = 16;
        match self.type_name(object)?.as_str() {
            "coroutine" | "generator" | "async_generator" => Some(object),
            "coroutine_wrapper" | "async_generator_asend" | "async_generator_athrow" => {
                self.pointer(object, INSIDE)
            }
            _ => None,
        }
    }
}

/// What was found on a stack.
#[derive(Default)]
pub struct Frames {
    /// Where each of the innermost ones is, and it.
    pub shown: Vec<(u64, Frame)>,
    /// How many more there are.
    pub omitted: usize,
    /// The outermost ones of those.
    pub bottom: VecDeque<(u64, Frame)>,
}
