//! Reads event files for the tests, with nothing of what writes them: its own CRC, its own protobuf.

/// One thing of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    Version(String),
    Start,
    Scalar { tag: String, value: f32 },
    Image { tag: String, description: String, size: (u64, u64), bytes: Vec<u8> },
    Text { tag: String, plugin: String, text: String },
}

/// Everything in a file with its step, up to a torn record at the end; an error where a checksum is wrong.
pub fn events(mut bytes: &[u8]) -> Result<Vec<(u64, Read)>, String> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(12) {
        let length = u64::from_le_bytes(head[..8].try_into().unwrap());
        check(&head[..8], &head[8..])?;
        let Some((message, rest)) = rest.split_at_checked(length as usize) else { break };
        let Some((checksum, rest)) = rest.split_at_checked(4) else { break };
        check(message, checksum)?;
        event(message, &mut found);
        bytes = rest;
    }
    Ok(found)
}

fn check(bytes: &[u8], stored: &[u8]) -> Result<(), String> {
    let crc = bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    });
    let masked = (!crc).rotate_right(15).wrapping_add(0xa282_ead8);
    match masked.to_le_bytes() == stored {
        true => Ok(()),
        false => Err(format!("wrong checksum of {} bytes", bytes.len())),
    }
}

/// A field of a message: its number, and its value as a number or as bytes.
struct Field<'a> {
    number: u64,
    value: u64,
    bytes: &'a [u8],
}

fn fields(mut bytes: &[u8]) -> Vec<Field<'_>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (mut value, mut part) = (0, &bytes[..0]);
        match key & 7 {
            0 => value = varint(&mut bytes),
            2 => {
                let length = varint(&mut bytes) as usize;
                (part, bytes) = bytes.split_at(length);
            }
            kind => (part, bytes) = bytes.split_at(if kind == 1 { 8 } else { 4 }),
        }
        found.push(Field { number: key >> 3, value, bytes: part });
    }
    found
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 127) << shift;
        if first & 128 == 0 {
            break;
        }
    }
    value
}

fn field<'a>(bytes: &'a [u8], number: u64) -> Field<'a> {
    let found = fields(bytes).into_iter().find(|field| field.number == number);
    found.unwrap_or(Field { number, value: 0, bytes: &[] })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn event(message: &[u8], found: &mut Vec<(u64, Read)>) {
    let wall_time = f64::from_le_bytes(field(message, 1).bytes.try_into().unwrap());
    assert!(wall_time > 1.7e9);
    let step = field(message, 2).value;
    for part in fields(message) {
        match part.number {
            3 => found.push((step, Read::Version(text(part.bytes)))),
            5 => found.extend(fields(part.bytes).iter().map(|value| (step, value_of(value.bytes)))),
            7 => {
                assert_eq!(field(part.bytes, 1).value, 1);
                found.push((step, Read::Start));
            }
            _ => {}
        }
    }
}

fn value_of(bytes: &[u8]) -> Read {
    let tag = text(field(bytes, 1).bytes);
    let metadata = field(bytes, 9).bytes;
    if let Ok(value) = field(bytes, 2).bytes.try_into() {
        return Read::Scalar { tag, value: f32::from_le_bytes(value) };
    }
    let (image, tensor) = (field(bytes, 4).bytes, field(bytes, 8).bytes);
    if image.is_empty() {
        assert_eq!(field(tensor, 1).value, 7);
        let plugin = text(field(field(metadata, 1).bytes, 1).bytes);
        return Read::Text { tag, plugin, text: text(field(tensor, 8).bytes) };
    }
    Read::Image {
        tag,
        description: text(field(metadata, 3).bytes),
        size: (field(image, 2).value, field(image, 1).value),
        bytes: field(image, 4).bytes.to_vec(),
    }
}
