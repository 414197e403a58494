//! A JPEG decoder whose every pixel equals libjpeg's at its default settings, which is what the peer's Pillow uses: the
//! accurate integer inverse transform, triangle-filter upsampling and fixed-point colour conversion. Other decoders
//! round differently by up to 16 levels at sharp edges, which would show in every loss of a replayed run.
//!
//! Baseline and progressive Huffman files of 8 bits with 1, 3 or 4 components (ITU-T T.81). For anything else
//! [`decode`] says no, and the caller has another decoder.

mod entropy;
mod samples;

use super::Picture;
use entropy::{Bits, Coefficients, Huffman, Scan};

/// A component of the frame.
struct Component {
    id: u8,
    /// Sampling factors.
    h: usize,
    v: usize,
    quantization: usize,
    /// Samples that belong to the picture.
    width: usize,
    height: usize,
    coefficients: Coefficients,
    /// The table as it was when the component's first scan began.
    table: Option<[i32; 64]>,
}

#[derive(Default)]
struct Tables {
    quantization: [Option<[i32; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    restart_interval: usize,
}

struct Frame {
    width: usize,
    height: usize,
    progressive: bool,
    /// The largest sampling factors.
    h: usize,
    v: usize,
    components: Vec<Component>,
}

/// How a file says its components are to be read.
#[derive(Default)]
struct Markers {
    jfif: bool,
    /// The transform byte of Adobe's marker.
    adobe: Option<u8>,
}

/// Decodes a whole file, or gives nothing where the file is of a kind that is not known here or is damaged.
/// `largest`: bytes of coefficients and samples beyond which a file is not taken.
pub(super) fn decode(bytes: &[u8], largest: u64) -> Option<Picture> {
    let (mut tables, mut markers) = (Tables::default(), Markers::default());
    let mut frame: Option<Frame> = None;
    let mut at = 2;
    loop {
        let marker = next_marker(bytes, &mut at)?;
        if marker == 0xD9 {
            break;
        }
        if matches!(marker, 0x01 | 0xD0..=0xD8) {
            continue;
        }
        let length = usize::from(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let segment = bytes.get(at..)?.get(2..length)?;
        at += length;
        match marker {
            0xC0..=0xC2 if frame.is_none() => {
                let read = frame.insert(Frame::read(segment, marker == 0xC2, largest)?);
                read.components.iter_mut().for_each(|c| c.coefficients.zero());
            }
            0xC4 => huffman_tables(segment, &mut tables)?,
            0xDB => quantization_tables(segment, &mut tables)?,
            0xDD => tables.restart_interval = usize::from(u16::from_be_bytes(*segment.first_chunk()?)),
            0xDA => at += scan(frame.as_mut()?, &tables, segment, &bytes[at..])?,
            0xE0 => markers.jfif |= segment.starts_with(b"JFIF\0"),
            0xEE if segment.starts_with(b"Adobe") => markers.adobe = segment.get(11).copied(),
            // Other frames: arithmetic coding, lossless, hierarchical.
            0xC0..=0xCF => return None,
            _ => {}
        }
    }
    samples::picture(frame?, &markers)
}

/// The bytes that decoding a whole file takes at most, beside the file; nothing where [`decode`] says no for its frame.
pub(super) fn bytes_at_most(bytes: &[u8]) -> Option<usize> {
    let mut at = 2;
    loop {
        let marker = next_marker(bytes, &mut at)?;
        if matches!(marker, 0x01 | 0xD0..=0xD8) {
            continue;
        }
        let length = usize::from(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        match marker {
            0xC0..=0xC2 => {
                return Some(Frame::read(bytes.get(at..)?.get(2..length)?, false, u64::MAX)?.bytes_at_most());
            }
            0xD9 | 0xDA => return None,
            _ => at += length,
        }
    }
}

/// The same of a file that is not there, by its (width, height) and how many columns and rows of pixels share a colour:
/// baseline, of three components.
pub(super) fn bytes_of_frame((width, height): (usize, usize), shared: u8) -> Option<usize> {
    let ([w1, w0], [h1, h0]) = (u16::try_from(width).ok()?.to_be_bytes(), u16::try_from(height).ok()?.to_be_bytes());
    let segment = [8, h1, h0, w1, w0, 3, 1, shared << 4 | shared, 0, 2, 0x11, 0, 3, 0x11, 0];
    Some(Frame::read(&segment, false, u64::MAX)?.bytes_at_most())
}

/// The next marker at or after `at`, which moves behind it.
fn next_marker(bytes: &[u8], at: &mut usize) -> Option<u8> {
    let found = bytes.get(*at..)?.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF))?;
    *at += found + 2;
    Some(bytes[*at - 1])
}

impl Frame {
    /// From its header, with no memory for coefficients yet.
    fn read(segment: &[u8], progressive: bool, largest: u64) -> Option<Frame> {
        let [precision, h1, h0, w1, w0, count] = *segment.first_chunk()?;
        let (height, width) = (usize::from(u16::from_be_bytes([h1, h0])), usize::from(u16::from_be_bytes([w1, w0])));
        let described: Vec<[u8; 3]> =
            segment[6..].as_chunks::<3>().0.iter().copied().take(usize::from(count)).collect();
        if precision != 8
            || width == 0
            || height == 0
            || described.len() != usize::from(count)
            || ![1, 3, 4].contains(&count)
        {
            return None;
        }
        let factors = |d: &[u8; 3]| (usize::from(d[1] >> 4), usize::from(d[1] & 15));
        if described.iter().map(factors).any(|(h, v)| !(1..=4).contains(&h) || !(1..=4).contains(&v)) {
            return None;
        }
        let h = described.iter().map(|d| factors(d).0).max()?;
        let v = described.iter().map(|d| factors(d).1).max()?;
        let needed = width as u64 * height as u64 * u64::from(count) * 4;
        if needed > largest {
            return None;
        }
        let (mcus_wide, mcus_high) = (width.div_ceil(8 * h), height.div_ceil(8 * v));
        let components = described
            .iter()
            .map(|d| {
                let (own_h, own_v) = factors(d);
                Component {
                    id: d[0],
                    h: own_h,
                    v: own_v,
                    quantization: usize::from(d[2] & 3),
                    width: (width * own_h).div_ceil(h),
                    height: (height * own_v).div_ceil(v),
                    coefficients: Coefficients::new(mcus_wide * own_h, mcus_high * own_v),
                    table: None,
                }
            })
            .collect();
        Some(Frame { width, height, progressive, h, v, components })
    }

    /// Coefficients and samples, while the former become the latter; or the samples and the picture.
    fn bytes_at_most(&self) -> usize {
        let samples = |c: &Component| c.width * c.height;
        let mut held: usize = self.components.iter().map(|c| c.coefficients.bytes()).sum();
        let mut most = held;
        for component in &self.components {
            held += samples(component);
            most = most.max(held);
            held -= component.coefficients.bytes();
        }
        most.max(held + 3 * self.width * self.height)
    }
}

fn quantization_tables(mut segment: &[u8], tables: &mut Tables) -> Option<()> {
    while let [kind, rest @ ..] = segment {
        let wide = usize::from(kind >> 4 != 0);
        let values = rest.get(..64 << wide)?;
        let mut table = [0i32; 64];
        for (k, &natural) in entropy::ZIGZAG.iter().enumerate() {
            table[natural] = match wide {
                0 => i32::from(values[k]),
                _ => i32::from(u16::from_be_bytes([values[2 * k], values[2 * k + 1]])),
            };
        }
        *tables.quantization.get_mut(usize::from(kind & 15))? = Some(table);
        segment = &rest[64 << wide..];
    }
    Some(())
}

fn huffman_tables(mut segment: &[u8], tables: &mut Tables) -> Option<()> {
    while let [kind, rest @ ..] = segment {
        let counts: [u8; 16] = *rest.first_chunk()?;
        let total = counts.iter().map(|&c| usize::from(c)).sum::<usize>();
        let values = rest[16..].get(..total)?;
        let class = if kind >> 4 == 0 { &mut tables.dc } else { &mut tables.ac };
        *class.get_mut(usize::from(kind & 15))? = Some(Huffman::new(&counts, values)?);
        segment = &rest[16 + total..];
    }
    Some(())
}

/// Decodes one scan into the frame's coefficients; gives the length of its data.
fn scan(frame: &mut Frame, tables: &Tables, header: &[u8], data: &[u8]) -> Option<usize> {
    let count = usize::from(*header.first()?);
    let selectors = header.get(1..1 + 2 * count)?.as_chunks::<2>().0;
    let [start, end, approximation] = *header.get(1 + 2 * count..)?.first_chunk()?;
    let mut parts = Vec::with_capacity(count);
    for &[id, table] in selectors {
        let index = frame.components.iter().position(|c| c.id == id)?;
        let component = &mut frame.components[index];
        if component.table.is_none() {
            component.table = tables.quantization[component.quantization];
        }
        parts.push((index, usize::from(table >> 4), usize::from(table & 15)));
    }
    let (start, end) = if frame.progressive { (usize::from(start), usize::from(end)) } else { (0, 63) };
    let (high, low) = if frame.progressive { (approximation >> 4, approximation & 15) } else { (0, 0) };
    if parts.is_empty() || start > end || end > 63 || low > 13 || (frame.progressive && (start == 0) != (end == 0)) {
        return None;
    }
    let mut scan =
        Scan { bits: Bits::new(data), start, end, high, low, end_of_band: 0, progressive: frame.progressive };
    let mut predictions = [0i32; 4];
    let (mcus_wide, mcus_high) = match parts[..] {
        // A scan of one component has its own blocks only, none that pad a larger unit.
        [(only, ..)] => {
            let c = &frame.components[only];
            (c.width.div_ceil(8), c.height.div_ceil(8))
        }
        _ => (frame.width.div_ceil(8 * frame.h), frame.height.div_ceil(8 * frame.v)),
    };
    for mcu in 0..mcus_wide * mcus_high {
        if tables.restart_interval > 0 && mcu > 0 && mcu % tables.restart_interval == 0 {
            scan.bits.restart()?;
            scan.end_of_band = 0;
            predictions = [0; 4];
        }
        let (x, y) = (mcu % mcus_wide, mcu / mcus_wide);
        for (part, &(index, dc, ac)) in parts.iter().enumerate() {
            let component = &mut frame.components[index];
            let (h, v) = if parts.len() == 1 { (1, 1) } else { (component.h, component.v) };
            let (dc, ac) = (tables.dc.get(dc)?.as_ref(), tables.ac.get(ac)?.as_ref());
            for (row, column) in (0..v).flat_map(|r| (0..h).map(move |c| (r, c))) {
                let block = component.coefficients.block_mut(x * h + column, y * v + row);
                scan.block(block, dc, ac, predictions.get_mut(part)?)?;
            }
        }
    }
    Some(scan.bits.position())
}
