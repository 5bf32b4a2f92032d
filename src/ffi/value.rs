//! What crosses between an interpreter and the supervisor: plain data by value, never an object.

use serde_json::{Map, Number, Value as Json};

use super::object::{Owned, utf8};
use super::py;

/// An argument: plain data by value, or the inside of a `bytes` object that the caller keeps alive.
#[derive(Debug)]
pub enum Arg<'a> {
    /// `None`, `bool`, `int`, `float`, `str`, `list`, `dict` with string keys.
    Json(Json),
    /// `bytes`.
    Bytes(&'a [u8]),
}

/// A result: a value that belongs to no interpreter.
#[derive(Debug)]
pub enum Value {
    /// As for an argument.
    Json(Json),
    /// `bytes`.
    Bytes(std::sync::Arc<Vec<u8>>),
}

/// Deeper data than any request of ours.
const MAX_DEPTH: usize = 32;

impl Arg<'_> {
    /// Reads a Python object. The text says what is not plain data.
    ///
    /// # Safety
    /// The thread is attached, and `raw` is an object that lives as long as the result.
    pub(super) unsafe fn from_object(raw: *mut py::PyObject) -> Result<Self, String> {
        // SAFETY: forwarded to the caller; the type check precedes the reading of the buffer, which
        // no one can change: bytes are immutable.
        unsafe {
            if py::PyBytes_Check(raw) != 0 {
                let data = py::PyBytes_AsString(raw).cast::<u8>();
                let size = py::PyBytes_Size(raw).unsigned_abs();
                return Ok(Self::Bytes(std::slice::from_raw_parts(data, size)));
            }
            json_from_object(raw, 0).map(Self::Json)
        }
    }
}

impl Value {
    /// `None`.
    pub const NONE: Self = Self::Json(Json::Null);

    /// Makes a Python object of it: a new reference, or null with an exception pending.
    ///
    /// # Safety
    /// The thread is attached.
    pub(super) unsafe fn into_object(self) -> *mut py::PyObject {
        // SAFETY: forwarded to the caller; the buffer outlives the call, which copies it.
        unsafe {
            match self {
                Self::Json(json) => json_into_object(&json),
                Self::Bytes(bytes) => {
                    py::PyBytes_FromStringAndSize(bytes.as_ptr().cast(), bytes.len().cast_signed())
                }
            }
        }
    }
}

impl From<Json> for Value {
    fn from(json: Json) -> Self {
        Self::Json(json)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Json(Json::Bool(value))
    }
}

unsafe fn json_from_object(raw: *mut py::PyObject, depth: usize) -> Result<Json, String> {
    if depth > MAX_DEPTH {
        return Err("data nested too deeply".into());
    }
    // SAFETY: the caller is attached and `raw` is alive; every item read below is borrowed from a
    // container that is alive, and no Python code runs between a borrow and its last use.
    unsafe {
        if raw == py::Py_None() {
            return Ok(Json::Null);
        }
        if py::PyBool_Check(raw) != 0 {
            return Ok(Json::Bool(raw == py::Py_True()));
        }
        if py::PyLong_Check(raw) != 0 {
            let number = py::PyLong_AsLongLong(raw);
            if number == -1 && !py::PyErr_Occurred().is_null() {
                py::PyErr_Clear();
                return Err("an int beyond 64 bits".into());
            }
            return Ok(Json::from(number));
        }
        if py::PyFloat_Check(raw) != 0 {
            let number = py::PyFloat_AsDouble(raw);
            return Number::from_f64(number).map(Json::Number).ok_or_else(|| format!("the number {number}"));
        }
        if py::PyUnicode_Check(raw) != 0 {
            return utf8(raw).map(Json::String).ok_or_else(|| "a string with lone surrogates".into());
        }
        if py::PyList_Check(raw) != 0 || py::PyTuple_Check(raw) != 0 {
            let size = py::PySequence_Size(raw);
            let items = (0..size).map(|index| {
                let item =
                    Owned::from_new(py::PySequence_GetItem(raw, index)).map_err(|error| error.to_string())?;
                json_from_object(item.as_ptr(), depth + 1)
            });
            return items.collect::<Result<Vec<_>, _>>().map(Json::Array);
        }
        if py::PyDict_Check(raw) != 0 {
            let mut map = Map::new();
            let (mut position, mut key, mut value) = (0, std::ptr::null_mut(), std::ptr::null_mut());
            while py::PyDict_Next(raw, &mut position, &mut key, &mut value) != 0 {
                if py::PyUnicode_Check(key) == 0 {
                    return Err("a dict with keys that are not strings".into());
                }
                let key = utf8(key).ok_or("a string with lone surrogates")?;
                map.insert(key, json_from_object(value, depth + 1)?);
            }
            return Ok(Json::Object(map));
        }
        let kind = std::ffi::CStr::from_ptr((*py::Py_TYPE(raw)).tp_name).to_string_lossy().into_owned();
        Err(format!("an object of type {kind}"))
    }
}

unsafe fn json_into_object(json: &Json) -> *mut py::PyObject {
    // SAFETY: the caller is attached. Containers are filled with new references that they take
    // over (list) or that are dropped after the container has taken its own (dict).
    unsafe {
        match json {
            Json::Null => py::Py_NewRef(py::Py_None()),
            Json::Bool(true) => py::Py_NewRef(py::Py_True()),
            Json::Bool(false) => py::Py_NewRef(py::Py_False()),
            Json::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(number), _) => py::PyLong_FromLongLong(number),
                (None, Some(number)) => py::PyLong_FromUnsignedLongLong(number),
                (None, None) => py::PyFloat_FromDouble(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => {
                py::PyUnicode_FromStringAndSize(text.as_ptr().cast(), text.len().cast_signed())
            }
            Json::Array(items) => {
                let list = py::PyList_New(items.len().cast_signed());
                if list.is_null() {
                    return list;
                }
                for (index, item) in items.iter().enumerate() {
                    let item = json_into_object(item);
                    if item.is_null() {
                        py::Py_DECREF(list);
                        return item;
                    }
                    py::PyList_SetItem(list, index.cast_signed(), item);
                }
                list
            }
            Json::Object(map) => {
                let dict = py::PyDict_New();
                if dict.is_null() {
                    return dict;
                }
                for (key, value) in map {
                    let key = json_into_object(&Json::String(key.clone()));
                    let value = json_into_object(value);
                    let done = if key.is_null() || value.is_null() {
                        -1
                    } else {
                        py::PyDict_SetItem(dict, key, value)
                    };
                    py::Py_XDECREF(key);
                    py::Py_XDECREF(value);
                    if done != 0 {
                        py::Py_DECREF(dict);
                        return std::ptr::null_mut();
                    }
                }
                dict
            }
        }
    }
}
