//! Files of `torch.save`: what is in them, and what is wrong with them. Whole files that are damaged at random are in
//! `tests/hostile` of the workspace.

#[path = "common/fixtures.rs"]
mod fixtures;

use std::fs;
use std::path::Path;

use cm_model::TensorMap;
use cm_net::import::{describe, load_any, read_torch};
use fixtures::{MARK, fixture, one_line, unpacked, weight};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// The one line that says why a file is not read, and names it.
fn refused(path: &Path) -> String {
    let line = one_line(read_torch(path).expect_err("it is read"));
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(line.contains(name), "the file is not named: {line}");
    line
}

fn counted(length: i64) -> Tensor {
    Tensor::arange(length, (Kind::Float, Device::Cpu))
}

#[test]
fn both_forms_hold_every_dtype() {
    for name in ["dtypes.pt", "dtypes_legacy.pt", "dtypes_protocol5.pt"] {
        let tensors = read_torch(&fixture(name)).unwrap();
        for (key, kind) in [
            ("float64", Kind::Double),
            ("float32", Kind::Float),
            ("float16", Kind::Half),
            ("bfloat16", Kind::BFloat16),
            ("int64", Kind::Int64),
            ("int32", Kind::Int),
            ("int16", Kind::Int16),
            ("int8", Kind::Int8),
            ("uint8", Kind::Uint8),
            ("bool", Kind::Bool),
        ] {
            let want = counted(6).view([2, 3]).to_kind(kind);
            assert!(tensors[key].kind() == kind && tensors[key].equal(&want), "{name}: {key}");
        }
        assert!(tensors["scalar"].size().is_empty() && tensors["scalar"].double_value(&[]) == 2.5, "{name}");
        assert_eq!(tensors["empty"].size(), [0, 3], "{name}");
        assert!(tensors["parameter"].equal(&Tensor::from_slice(&[1f32, 2.0])), "{name}");
        assert_eq!(tensors.len(), 13, "{name}");
    }
}

#[test]
fn tensors_are_views_of_one_storage() {
    for name in ["views.pt", "views_legacy.pt"] {
        let tensors = read_torch(&fixture(name)).unwrap();
        let base = counted(24);
        let matrix = base.view([4, 6]);
        let want: TensorMap = [
            ("whole", base.shallow_clone()),
            ("matrix", matrix.shallow_clone()),
            ("transposed", matrix.tr()),
            ("slice", base.narrow(0, 5, 4)),
            ("strided", matrix.slice(0, 1, None, 2).slice(1, None, None, 3)),
            ("permuted", base.view([2, 3, 4]).permute([2, 0, 1])),
        ]
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{name}");
        for (key, want) in want {
            assert!(tensors[&key].equal(&want), "{name}: {key}");
        }
        // What is shared in the file is shared here, and costs its memory once.
        assert_eq!(tensors["whole"].data_ptr(), tensors["matrix"].data_ptr(), "{name}");
        assert!(!tensors["transposed"].is_contiguous(), "{name}");
    }
}

#[test]
fn a_state_dict_in_other_dicts_is_found_where_there_is_one() {
    let training = read_torch(&fixture("training.pt")).unwrap();
    assert_eq!(training.keys().collect::<Vec<_>>(), ["a"], "not the optimizer's state");
    assert_eq!(describe(&fixture("training.pt")).unwrap().form, "torch.save, zip form, in 'model'");
    let (_folder, path) = unpacked("openai_bf16.pt");
    let tensors = read_torch(&path).unwrap();
    for (name, tensor) in &tensors {
        assert!(tensor.equal(&weight(name, &tensor.size(), Kind::BFloat16)), "{name}");
    }
    let line = refused(&fixture("several.pt"));
    assert!(
        line.contains("2 dicts of tensors (model, ema)") && line.contains("torch.load(FILE)['model']"),
        "{line}"
    );
    let line = refused(&fixture("mixed.pt"));
    assert!(line.contains("'step': an integer") && line.contains("torch.is_tensor(v)"), "{line}");
    let line = verdict(b"\x80\x02}X\x05\0\0\0a\x1b[2JK\x01s.");
    assert!(line.contains("'a\\u{1b}[2J': an integer") && !line.contains('\x1b'), "{line}");
}

#[test]
fn a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing() {
    for name in ["evil.pt", "evil_legacy.pt", "evil_edm.pkl"] {
        for line in [refused(&fixture(name)), load_any(&fixture(name), None).unwrap_err().to_string()] {
            assert!(line.contains("'posix.system'") && line.contains("nothing of it was run"), "{line}");
        }
        assert!(!Path::new(MARK).exists(), "{name} ran its command");
    }
    let (_folder, path) = unpacked("edm_ddpmpp.pkl");
    let line = refused(&path);
    assert!(line.contains("'torch_utils.persistence._reconstruct_persistent_obj'"), "{line}");
    assert!(line.contains("scripts/convert_edm.py"), "{line}");
}

#[test]
fn what_is_cut_off_damaged_or_boastful_is_one_line() {
    for (name, words) in [
        ("truncated.pt", &["truncated", "download"][..]),
        ("truncated_legacy.pt", &["truncated"]),
        ("damaged.pt", &["checksum", "damaged"]),
        ("big_endian.pt", &["byte order 'big'", "little-endian"]),
        ("claims_2gb.pt", &["2147483648 bytes"]),
        ("claims_2gb_legacy.pt", &["2147483648 bytes"]),
    ] {
        let line = refused(&fixture(name));
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("renamed.pt");
    let mut bytes = fs::read(fixture("dtypes.pt")).unwrap();
    let at = bytes.windows(7).position(|window| window == b"float64").unwrap();
    bytes[at + 6] = b'5';
    fs::write(&path, bytes).unwrap();
    let line = refused(&path);
    assert!(line.contains("data.pkl has another checksum"), "{line}");
    for name in ["claims_2gb.safetensors", "claims_2gb_head.safetensors"] {
        for line in [
            load_any(&fixture(name), None).unwrap_err().to_string(),
            describe(&fixture(name)).unwrap_err().to_string(),
        ] {
            assert!(line.contains(name) && !line.contains('\n'), "{line}");
        }
    }
    let path = folder.path().join("nothing.safetensors");
    let head = format!(r#"{{"a":{{"dtype":"F32","shape":[0,{0},{0}],"data_offsets":[0,0]}}}}"#, 1u64 << 40);
    fs::write(&path, [&(head.len() as u64).to_le_bytes(), head.as_bytes()].concat()).unwrap();
    let line = load_any(&path, None).unwrap_err().to_string();
    assert!(line.contains("nothing.safetensors: "), "{line}");
    let head = r#"{"a\u001b[2J":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
    fs::write(&path, [&(head.len() as u64).to_le_bytes(), head.as_bytes(), &[0; 4]].concat()).unwrap();
    for error in [load_any(&path, None).unwrap_err(), describe(&path).unwrap_err()] {
        assert!(!error.to_string().contains('\x1b'), "{error}");
    }
    for (name, content) in
        [("empty.pt", &b""[..]), ("text.pt", b"hello"), ("half.pt", b"PK\x03\x04"), ("p.pt", b"\x80\x02")]
    {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        refused(&path);
    }
    refused(&folder.path().join("nowhere.pt"));
    assert!(read_torch(folder.path()).is_err(), "a folder");
}

/// A whole file of the older form around the pickle of its object.
fn legacy(object: &[u8], storages: &[u8]) -> Vec<u8> {
    let mut file = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
    file.extend(b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s.");
    file.extend(object);
    file.extend(storages);
    file
}

/// What is said of that object.
fn verdict(object: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made.pt");
    fs::write(
        &path,
        legacy(object, b"\x80\x02](X\x01\x00\x00\x00ke.\x06\0\0\0\0\0\0\0abcdefabcdefabcdefabcdef"),
    )
    .unwrap();
    match read_torch(&path) {
        Ok(tensors) => format!("{:?}", tensors.values().map(Tensor::size).collect::<Vec<_>>()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn extents_are_held_against_the_storage() {
    // As versions before 0.4 wrote it from Python 2: `_rebuild_tensor` has four arguments, and an OrderedDict is a
    // call with a list of pairs. The storage has 6 numbers.
    let made = |offset: &[u8], size: &[u8], stride: &[u8]| {
        let mut pickle =
            b"\x80\x02ccollections\nOrderedDict\n](U\x01tctorch._utils\n_rebuild_tensor\n((U\x07storage"
                .to_vec();
        pickle.extend(b"ctorch\nFloatStorage\nU\x01kU\x03cpuK\x06NtQ");
        for part in [offset, size, stride, b"tR\x86e\x85R."] {
            pickle.extend(part);
        }
        verdict(&pickle)
    };
    assert_eq!(made(b"K\x00", b"K\x02K\x03\x86", b"K\x03K\x01\x86"), "[[2, 3]]");
    assert_eq!(made(b"K\x05", b"K\x01\x85", b"K\x09\x85"), "[[1]]", "a stride that is not taken");
    assert_eq!(made(b"K\x06", b"K\x00\x85", b"K\x01\x85"), "[[0]]", "nothing, at the end");
    let minus = b"J\xff\xff\xff\xff";
    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
    let beyond = b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00";
    for (what, offset, size, stride) in [
        ("one too far", &b"K\x01"[..], &b"K\x02K\x03\x86"[..], &b"K\x03K\x01\x86"[..]),
        ("a wide stride", b"K\x00", b"K\x02\x85", b"K\x06\x85"),
        ("more than there is, by a stride of 0", b"K\x00", b"K\x07\x85", b"K\x00\x85"),
        ("an offset behind", b"K\x07", b"K\x00\x85", b"K\x01\x85"),
        ("a negative offset", minus, b"K\x01\x85", b"K\x01\x85"),
        ("a negative side", b"K\x00", &[minus, &b"\x85"[..]].concat(), b"K\x01\x85"),
        ("a negative stride", b"K\x05", b"K\x02\x85", &[minus, &b"\x85"[..]].concat()),
        ("sides without strides", b"K\x00", b"K\x02K\x03\x86", b"K\x01\x85"),
        ("a product beyond 64 bits", b"K\x00", &[&huge[..], huge, b"\x86"].concat(), b"K\x00K\x00\x86"),
        (
            "nothing, in a shape beyond 64 bits",
            b"K\x00",
            &[&b"(K\x00"[..], huge, huge, b"t"].concat(),
            b"K\x01K\x01K\x01\x87",
        ),
        ("a stride beyond", b"K\x00", b"K\x03\x85", &[&huge[..], b"\x85"].concat()),
        ("a side of more than 64 bits", b"K\x00", &[&beyond[..], b"\x85"].concat(), b"K\x01\x85"),
        ("a text for a side", b"K\x00", b"U\x01a\x85", b"K\x01\x85"),
    ] {
        let line = made(offset, size, stride);
        assert!(line.contains("made.pt: "), "{what}: {line}");
    }
    assert!(made(b"K\x00", &[&b"("[..], &b"K\x01".repeat(17), b"t"].concat(), b")").contains("axes"));
}

#[test]
fn pickles_that_are_large_out_of_nothing_end_early() {
    let nest = |inner: &[u8], times: usize, open: &[u8]| {
        [b"\x80\x02", &open.repeat(times)[..], inner, b"."].concat()
    };
    for (what, pickle, words) in [
        ("a tower of tuples", nest(b"", 3_000_000, b")\x85"), "values"),
        ("a tower of lists", nest(b"", 3_000_000, b"]"), "values"),
        ("a tower that holds itself", nest(b"]q\x00h\x00a", 1, b""), "a list"),
        ("a dict that holds itself", nest(b"}q\x00U\x01ah\x00s", 1, b""), "no dict of tensors"),
        // Each list holds the one before twice: 2^100 if anyone counted.
        ("laughs", nest(b"", 100, b"]q\x00h\x00h\x00\x86q\x00"), "a tuple"),
        ("marks", nest(b"", 3_000_000, b"("), "values"),
        (
            "notes",
            nest(
                b"",
                1,
                &(0..3_000_000u32).flat_map(|i| [&b"r"[..], &i.to_le_bytes()].concat()).fold(
                    b"N".to_vec(),
                    |mut all, byte| {
                        all.push(byte);
                        all
                    },
                ),
            ),
            "values",
        ),
        (
            "a list that is made a dict again and again",
            nest(
                b"",
                1,
                &[
                    &b"(](K\x00K\x00\x86"[..],
                    &b"K\x00K\x00\x86".repeat(1000),
                    b"e\x85q\x00",
                    &b"ccollections\nOrderedDict\nh\x00R".repeat(2000),
                ]
                .concat(),
            ),
            "values",
        ),
        ("a text of 4 GB", nest(b"X\xff\xff\xff\xffa", 1, b""), "bytes"),
        ("a text of 2^63 bytes", nest(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa", 1, b""), "bytes"),
        ("an integer of 2 GB", nest(b"\x8b\xff\xff\xff\x7f", 1, b""), "integer"),
        ("a note that is not there", nest(b"h\x07", 1, b""), "nothing under 7"),
        ("a mark that is not there", nest(b"t", 1, b""), "mark"),
        ("a value below the mark", nest(b"N(0", 1, b""), "there is none"),
        ("nothing", nest(b"", 1, b""), "there is none"),
        ("a key alone", nest(b"}(K\x01u", 1, b""), "key without a value"),
        ("an item of a number", nest(b"K\x01K\x02K\x03s", 1, b""), "an integer"),
        ("a call of a number", nest(b"K\x01)R", 1, b""), "calls an integer"),
        ("a state of a number", nest(b"K\x01}b", 1, b""), "the state of an integer"),
        ("a persistent id of nothing", nest(b"NQ", 1, b""), "persistent id"),
        ("an unknown instruction", nest(b"\xff", 1, b""), "0xff"),
        ("an instance of a class", nest(b"(ios\nsystem\n", 1, b""), "'os.system'"),
        ("a name of 1 MB", nest(&[&b"c"[..], &b"a".repeat(1 << 20), b"\nb\n"].concat(), 1, b""), "256 bytes"),
        ("a name with a line's end", nest(b"\x8c\x04a\nb'\x8c\x01c\x93", 1, b""), "'a\\nb"),
        ("a name by way of a stack", nest(b"\x8c\x08builtins\x8c\x04eval\x93", 1, b""), "'builtins.eval'"),
        ("a storage that is called", nest(b"ctorch\nFloatStorage\nK\x01\x85R", 1, b""), "a storage"),
        ("an extension", nest(b"\x82\x01", 1, b""), "0x82"),
    ] {
        let line = verdict(&pickle);
        assert!(line.contains(words) && line.contains("made.pt: "), "{what}: {line}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes as the pickle of the object.
    #[test]
    fn any_pickle_is_read_or_refused(object in prop::collection::vec(any::<u8>(), 0..200)) {
        verdict(&object);
    }

    /// Instructions in any order.
    #[test]
    fn any_program_is_read_or_refused(
        program in prop::collection::vec(prop::sample::select(vec![
            &b"("[..], b"N", b"K\x01", b"t", b")", b"\x85", b"\x86", b"\x87", b"]", b"}", b"l", b"d", b"a", b"e", b"s",
            b"u", b"q\x00", b"h\x00", b"\x94", b"R", b"\x81", b"b", b"Q", b"0", b"1", b"2", b"U\x01k", b"U\x07storage",
            b"U\x03cpu", b"K\x06", b"K\x00", b"\x88", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
            b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch._utils\n_rebuild_parameter\n", b"(U\x07storagectorch\nFloatStorage\nU\x01kU\x03cpuK\x06tQ",
        ]), 0..60),
    ) {
        let mut object = program.concat();
        object.push(b'.');
        verdict(&object);
    }
}
