//! What a data set is told to find, how it pairs and keeps pictures, and its pixels against the peers'.

use super::*;
use crate::diffusion::Draws;
use serde_json::Value;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images")
}

fn options(dir: impl Into<PathBuf>, resolution: usize) -> DatasetOptions {
    DatasetOptions {
        instance_dir: dir.into(),
        captions: None,
        class: None,
        resolution,
        center_crop: false,
        random_flip: false,
        interpolation: Interpolation::Bilinear,
        keep_bytes: KEEP_BYTES,
        verify: true,
        decode_bytes: None,
    }
}

fn fingerprint(pixels: &[f32]) -> String {
    let bytes = pixels.iter().flat_map(|v| v.to_le_bytes());
    let hash = bytes.fold(0xcbf29ce484222325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3));
    format!("{hash:016x}")
}

/// Every picture of tests/data/images through Pillow and torchvision, as golden.json holds it, to the last bit.
#[test]
fn pixels_are_the_peer_s() {
    let golden: Value = serde_json::from_slice(&std::fs::read(data().join("golden.json")).unwrap()).unwrap();
    for (folder, files) in golden.as_object().unwrap() {
        for (index, (file, cases)) in files.as_object().unwrap().iter().enumerate() {
            for case in cases.as_array().unwrap() {
                let number = |i: usize| case[i].as_u64().unwrap() as usize;
                let filter_name = case[1].as_str().unwrap();
                for keep_bytes in [0, KEEP_BYTES] {
                    let wanted = DatasetOptions {
                        interpolation: Interpolation::named(filter_name).unwrap(),
                        keep_bytes,
                        verify: false,
                        ..options(data().join(folder), number(0))
                    };
                    let dataset = Dataset::open(&wanted).unwrap();
                    assert_eq!(dataset.path(Row::Instance, index as u64).file_name().unwrap(), file.as_str());
                    let crop = Crop::At { top: number(4), left: number(5) };
                    let got = dataset.prepare(Row::Instance, index as u64, crop).unwrap();
                    assert_eq!(got.original_size, (number(2), number(3)), "{file}");
                    let hash = case[6].as_str().unwrap();
                    assert_eq!(fingerprint(&got.pixels), hash, "{folder}/{file} {filter_name}");
                }
            }
        }
    }
}

#[test]
fn items_pair_instances_with_class_images_and_the_smaller_set_cycles() {
    let wanted = DatasetOptions { class: Some((data().join("sizes"), 4)), ..options(data().join("rough"), 16) };
    let dataset = Dataset::open(&wanted).unwrap();
    assert_eq!((dataset.len(), dataset.instance_count(), dataset.class_count()), (6, 6, 4));
    let name = |row, item| dataset.path(row, item).file_name().unwrap().to_string_lossy().into_owned();
    assert_eq!(name(Row::Instance, 0), "a photo.png");
    assert_eq!(name(Row::Instance, 7), "b.JPG");
    assert_eq!(name(Row::Class, 5), name(Row::Class, 1));
}

#[test]
fn center_crops_and_mirrored_ones_agree_with_the_whole_picture() {
    let draws = Draws::new(4);
    for (center_crop, item) in (0..12).flat_map(|i| [(true, i), (false, i)]) {
        let whole =
            DatasetOptions { center_crop, random_flip: true, keep_bytes: 0, ..options(data().join("sizes"), 48) };
        let kept = DatasetOptions { keep_bytes: KEEP_BYTES, ..whole.clone() };
        let (whole, kept) = (Dataset::open(&whole).unwrap(), Dataset::open(&kept).unwrap());
        let (top, left) = draws.crop(Row::Instance, item);
        let crops = [false, true].map(|flip| Crop::Drawn { top, left, flip });
        let [plain, mirrored] = crops.map(|crop| kept.prepare(Row::Instance, item, crop).unwrap());
        assert_eq!(plain, whole.prepare(Row::Instance, item, crops[0]).unwrap());
        assert_eq!(mirrored, whole.prepare(Row::Instance, item, crops[1]).unwrap());
        assert_eq!(plain.crop_top_left, mirrored.crop_top_left);
    }
}

#[test]
fn only_rows_without_chance_are_deterministic() {
    let random = Dataset::open(&options(data().join("sizes"), 48)).unwrap();
    let square = |d: &Dataset| (0..d.len() as u64).find(|&i| d.path(Row::Instance, i).ends_with("48x48.png")).unwrap();
    assert!(random.is_deterministic(Row::Instance, square(&random)).unwrap());
    assert_eq!((0..12).filter(|&i| random.is_deterministic(Row::Instance, i).unwrap()).count(), 2);
    let centered = DatasetOptions { center_crop: true, ..options(data().join("sizes"), 48) };
    let centered = Dataset::open(&centered).unwrap();
    assert!((0..12).all(|i| centered.is_deterministic(Row::Instance, i).unwrap()));
    let flipped = DatasetOptions { center_crop: true, random_flip: true, ..options(data().join("sizes"), 48) };
    assert!(!Dataset::open(&flipped).unwrap().is_deterministic(Row::Instance, 0).unwrap());
}

#[test]
fn every_bad_file_is_named_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(data().join("rough/a photo.png")).unwrap();
    let jpeg = std::fs::read(data().join("rough/b.JPG")).unwrap();
    let webp = std::fs::read(data().join("rough/f.webp")).unwrap();
    let mut corrupt = whole.clone();
    corrupt[5000] ^= 0xFF;
    let files: [(&str, &[u8]); 8] = [
        ("good.png", &whole),
        (".hidden", b"passed over"),
        ("corrupt.png", &corrupt),
        ("cut.png", &whole[..whole.len() / 2]),
        ("cut.jpg", &jpeg[..jpeg.len() - 100]),
        ("cut.webp", &webp[..webp.len() - 1]),
        ("text.png", b"a text file"),
        ("empty.jpg", b""),
    ];
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    std::fs::create_dir(folder.path().join("sub-folder")).unwrap();
    let error = Dataset::open(&options(folder.path(), 16)).unwrap_err();
    let problems = &error.downcast_ref::<Refusal>().unwrap().problems;
    let named = |name: &str| problems.iter().any(|p| p.contains(name) && p.contains("Replace the file"));
    let bad = ["corrupt.png", "cut.png", "cut.jpg", "cut.webp", "text.png", "empty.jpg"];
    assert!(bad.iter().all(|name| named(name)), "{problems:?}");
    assert_eq!(problems.len(), bad.len());
}

#[test]
fn a_picture_that_takes_more_than_was_planned_is_refused() {
    let planned = |decode_bytes: Option<usize>| {
        let options = DatasetOptions { decode_bytes, verify: false, ..options(data().join("rough/instance"), 16) };
        let path = Dataset::open(&options).unwrap().path(Row::Instance, 0).to_path_buf();
        let taken = Footprint::read(&path, &options, Row::Instance).unwrap().decoding;
        (Dataset::open(&options).unwrap().crop_range(Row::Instance, 0), taken)
    };
    let (_, taken) = planned(None);
    assert!(planned(Some(taken)).0.is_ok());
    let error = planned(Some(taken - 1)).0.unwrap_err();
    assert!(error.is::<Refusal>() && error.to_string().contains("the file has changed since"), "{error}");
}

#[test]
fn wrong_folders_are_refused() {
    let refused = |options: &DatasetOptions| {
        let error = Dataset::open(options).unwrap_err();
        assert!(error.is::<Refusal>());
        error.to_string()
    };
    let empty = tempfile::tempdir().unwrap();
    assert!(refused(&options("no/such/folder", 16)).contains("no/such/folder (data.instance_dir) does not exist"));
    assert!(refused(&options(empty.path(), 16)).contains("holds no images"));
    assert!(refused(&options(data().join("golden.json"), 16)).contains("not a folder"));
    let few = DatasetOptions { class: Some((data().join("rough"), 100)), ..options(data().join("rough"), 16) };
    assert!(refused(&few).contains("94 are missing"));
    let dataset = Dataset::open(&options(data().join("rough"), 72)).unwrap();
    let outside = dataset.prepare(Row::Instance, 0, Crop::At { top: 1, left: 0 }).unwrap_err();
    assert!(outside.is::<Refusal>() && outside.to_string().contains("a photo.png"));
}
