//! CPython's table of the lines of a code object's instructions.

/// The line of an instruction, by CPython's location table: entries that each say how many
/// instructions they are for, and how the line differs from that of the entry before.
pub fn line_at(table: &[u8], first: i64, instruction: u64) -> Option<i64> {
    let mut bytes = table.iter().copied();
    let mut line = first;
    let mut end = 0;
    while let Some(head) = bytes.next() {
        let code = head >> 3 & 15;
        let mut has_line = true;
        match code {
            0..=9 => drop(bytes.next()),
            10..=12 => {
                line = line.wrapping_add(i64::from(code - 10));
                bytes.next();
                bytes.next();
            }
            13 => line = line.wrapping_add(signed(&mut bytes)?),
            14 => {
                line = line.wrapping_add(signed(&mut bytes)?);
                for _ in 0..3 {
                    unsigned(&mut bytes)?;
                }
            }
            _ => has_line = false,
        }
        end += u64::from(head & 7) + 1;
        if instruction < end {
            return has_line.then_some(line);
        }
    }
    None
}

/// A number in pieces of six bits, lowest first.
fn unsigned(bytes: &mut impl Iterator<Item = u8>) -> Option<u64> {
    let mut value = 0;
    for shift in (0..60).step_by(6) {
        let byte = bytes.next()?;
        value |= u64::from(byte & 63) << shift;
        if byte & 64 == 0 {
            return Some(value);
        }
    }
    None
}

/// The same with a sign in the lowest bit.
fn signed(bytes: &mut impl Iterator<Item = u8>) -> Option<i64> {
    let value = unsigned(bytes)?;
    let size = i64::try_from(value >> 1).ok()?;
    Some(if value & 1 == 1 { -size } else { size })
}
