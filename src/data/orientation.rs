//! Which way up a photograph was taken: the EXIF orientation tag, or failing that XMP's, from wherever the file keeps
//! them, and the turn that makes the picture upright. As in Pillow's `exif_transpose`.

use super::Picture;
use exif::{In, Tag};

/// An EXIF orientation, 1 (upright) to 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Orientation(u8);

impl Orientation {
    pub(super) const UPRIGHT: Orientation = Orientation(1);
    /// The camera stood on its side.
    pub(super) const QUARTER: Orientation = Orientation(6);

    /// Whether nothing has to be turned.
    pub(super) fn is_upright(self) -> bool {
        !(2..=8).contains(&self.0)
    }

    pub(super) fn swaps_sides(self) -> bool {
        (5..=8).contains(&self.0)
    }

    /// Turns and mirrors `picture` so that it is seen as its photographer saw it.
    pub(super) fn upright(self, picture: Picture) -> Picture {
        let (w, h) = (picture.width, picture.height);
        // From a pixel of the result to the pixel of the picture that belongs there.
        let from: fn(usize, usize, usize, usize) -> (usize, usize) = match self.0 {
            2 => |x, y, w, _| (w - 1 - x, y),
            3 => |x, y, w, h| (w - 1 - x, h - 1 - y),
            4 => |x, y, _, h| (x, h - 1 - y),
            5 => |x, y, _, _| (y, x),
            6 => |x, y, _, h| (y, h - 1 - x),
            7 => |x, y, w, h| (w - 1 - y, h - 1 - x),
            8 => |x, y, w, _| (w - 1 - y, x),
            _ => return picture,
        };
        let (width, height) = if self.swaps_sides() { (h, w) } else { (w, h) };
        let mut rgb = Vec::with_capacity(picture.rgb.len());
        for y in 0..height {
            for x in 0..width {
                let (x, y) = from(x, y, w, h);
                rgb.extend_from_slice(&picture.rgb[(y * w + x) * 3..][..3]);
            }
        }
        Picture { width, height, rgb }
    }
}

/// The orientation that a file's EXIF (a TIFF structure) or XMP (XML) states.
pub(super) fn find(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    exif.and_then(of_exif).or_else(|| xmp.and_then(of_xmp)).unwrap_or(Orientation::UPRIGHT)
}

/// The orientation of a PNG file, all of whose chunks have been read: of the eXIf chunk, of the text that ImageMagick
/// puts EXIF into, or of XMP.
pub(super) fn of_png(info: &png::Info) -> Orientation {
    const RAW: &str = "Raw profile type exif";
    let plain = info.uncompressed_latin1_text.iter().find(|t| t.keyword == RAW).map(|t| t.text.clone());
    let packed = || info.compressed_latin1_text.iter().find(|t| t.keyword == RAW).and_then(|t| t.get_text().ok());
    let exif = match &info.exif_metadata {
        Some(chunk) => Some(chunk.to_vec()),
        None => plain.or_else(packed).and_then(|text| raw_profile(&text)),
    };
    let xmp = info.utf8_text.iter().find(|t| t.keyword == "XML:com.adobe.xmp").and_then(|t| t.get_text().ok());
    find(exif.as_deref(), xmp.as_ref().map(String::as_bytes))
}

/// Decodes "\nexif\n   length\nhexadecimal\nhexadecimal…".
fn raw_profile(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.splitn(4, '\n').nth(3)?.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let nibble = |b: u8| char::from(b).to_digit(16);
    digits.as_chunks::<2>().0.iter().map(|&[a, b]| Some((nibble(a)? << 4 | nibble(b)?) as u8)).collect()
}

fn of_exif(data: &[u8]) -> Option<Orientation> {
    let mut tiff = data;
    while let Some(rest) = tiff.strip_prefix(b"Exif\0\0") {
        tiff = rest;
    }
    let mut reader = exif::Reader::new();
    reader.continue_on_error(true);
    let parsed = reader.read_raw(tiff.to_vec()).or_else(|e| e.distill_partial_result(|_| {})).ok()?;
    let value = parsed.get_field(Tag::Orientation, In::PRIMARY)?.value.get_uint(0)?;
    // Other values mean upright, and that the tag is there: XMP is not asked.
    Some(Orientation(u8::try_from(value).unwrap_or(1)))
}

/// The digit after `tiff:Orientation="` or `tiff:Orientation>`.
fn of_xmp(xml: &[u8]) -> Option<Orientation> {
    const NAME: &[u8] = b"tiff:Orientation";
    (0..xml.len()).find_map(|at| {
        let rest = xml[at..].strip_prefix(NAME)?;
        let digit = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?.first()?;
        digit.is_ascii_digit().then(|| Orientation(digit - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Red counts the pixels of a 3 × 2 picture.
    fn turned(orientation: u8) -> (usize, Vec<u8>) {
        let picture = Picture { width: 3, height: 2, rgb: (0..6).flat_map(|v| [v, 0, 0]).collect() };
        let upright = Orientation(orientation).upright(picture);
        (upright.width, upright.rgb.chunks_exact(3).map(|p| p[0]).collect())
    }

    #[test]
    fn every_orientation_is_turned_upright() {
        let expected = [
            (1, 3, [0, 1, 2, 3, 4, 5]),
            (2, 3, [2, 1, 0, 5, 4, 3]),
            (3, 3, [5, 4, 3, 2, 1, 0]),
            (4, 3, [3, 4, 5, 0, 1, 2]),
            (5, 2, [0, 3, 1, 4, 2, 5]),
            (6, 2, [3, 0, 4, 1, 5, 2]),
            (7, 2, [5, 2, 4, 1, 3, 0]),
            (8, 2, [2, 5, 1, 4, 0, 3]),
            (9, 3, [0, 1, 2, 3, 4, 5]),
        ];
        for (orientation, width, pixels) in expected {
            assert_eq!(turned(orientation), (width, pixels.to_vec()), "orientation {orientation}");
        }
    }

    #[test]
    fn exif_wins_over_xmp_and_damage_means_upright() {
        let tiff =
            |value: u8| [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".as_slice(), &[value], &[0; 7]].concat();
        let xmp = b"<rdf:Description tiff:Orientation=\"8\"/>".as_slice();
        let prefixed = [b"Exif\0\0".as_slice(), &tiff(6)].concat();
        assert_eq!(find(Some(&tiff(3)), Some(xmp)), Orientation(3));
        assert_eq!(find(Some(&prefixed), None), Orientation(6));
        assert_eq!(find(Some(b"damaged"), Some(xmp)), Orientation(8));
        assert_eq!(find(None, Some(b"<tiff:Orientation>6</tiff:Orientation>")), Orientation(6));
        assert_eq!(find(Some(b""), Some(b"tiff:Orientation=")), Orientation::UPRIGHT);
        assert_eq!(raw_profile("\nexif\n  4\n4949\n2a00\n"), Some(b"II*\0".to_vec()));
    }
}
