//! The frame codec against peers that are slow, cut off or hostile.

use _native::wire::frame::{Decoder, Frame, MAX_PAYLOAD, encode_head};
use _native::wire::message::{MAX_VALUES, encode};

fn frame(header: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = encode_head(header, payload.len()).expect("within the limits");
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn frames_come_back_whatever_the_pieces_are() {
    let stream = [frame(b"{}", b""), frame(b"{\"a\":1}", &[7; 1000]), frame(b"x", b"y")].concat();
    for piece in [1, 2, 3, 15, 16, 17, 999, stream.len()] {
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        for bytes in stream.chunks(piece) {
            decoder.push(bytes);
            while let Some(frame) = decoder.next_frame().expect("a whole stream") {
                found.push(frame);
            }
        }
        let expected = [
            Frame { header: b"{}".to_vec(), payload: vec![] },
            Frame { header: b"{\"a\":1}".to_vec(), payload: vec![7; 1000] },
            Frame { header: b"x".to_vec(), payload: b"y".to_vec() },
        ];
        assert_eq!(found, expected, "in pieces of {piece}");
        assert!(!decoder.is_mid_frame(), "in pieces of {piece}");
    }
}

#[test]
fn garbage_is_refused_at_its_first_byte() {
    for garbage in [&b"G"[..], b"GET / HTTP/1.1\r\n", b"TH\0\x02", b"\0\0\0\0", b"TX"] {
        let mut decoder = Decoder::new();
        decoder.push(garbage);
        let error = decoder.next_frame().expect_err("garbage");
        assert!(error.is_protocol(), "{garbage:?}: {error}");
    }
}

#[test]
fn a_claimed_length_allocates_nothing_and_too_long_a_one_is_refused() {
    let mut decoder = Decoder::new();
    let mut head = encode_head(b"{}", 0).expect("within the limits");
    head[8..16].copy_from_slice(&(4u64 << 30).to_le_bytes());
    decoder.push(&head);
    assert_eq!(decoder.next_frame().expect("so far legal"), None);
    assert!(decoder.is_mid_frame());

    let mut decoder = Decoder::new();
    head[8..16].copy_from_slice(&(MAX_PAYLOAD + 1).to_le_bytes());
    decoder.push(&head);
    assert!(decoder.next_frame().expect_err("over the limit").is_protocol());
}

#[test]
fn half_a_frame_is_no_frame() {
    let whole = frame(b"{\"a\":1}", &[7; 100]);
    for cut in 0..whole.len() {
        let mut decoder = Decoder::new();
        decoder.push(&whole[..cut]);
        assert_eq!(decoder.next_frame().expect("so far legal"), None, "cut at {cut}");
        assert_eq!(decoder.is_mid_frame(), cut > 0);
    }
}

#[test]
fn what_nobody_would_accept_is_not_sent() {
    let error = encode_head(b"{}", usize::MAX).expect_err("over the limit");
    assert!(error.is_invalid_input(), "{error}");
    let many = serde_json::json!(vec![0; MAX_VALUES]);
    let error = encode(&many, 0).expect_err("over the limit");
    assert!(error.is_invalid_input(), "{error}");
    let long = serde_json::json!(",".repeat(2 * MAX_VALUES));
    assert!(encode(&long, 0).is_ok());
}
