//! Tensors in safetensors files: read into host memory one by one, written back densely.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::{DType, Error, Tensor};

/// Bytes of the little-endian header length every file starts with.
const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Every tensor of a file, by name, in host memory.
///
/// *dtypes*: F32, F16, BF16, I32; BOOL and U8 become masks (0 is false).
///
/// ```
/// use tilefold::{DType, Tensor, safetensors};
/// let path = std::env::temp_dir().join(format!("tilefold-doc-{}.safetensors", std::process::id()));
/// let q = Tensor::from_vec(vec![1.0_f32, 2.0, 3.0], &[1, 3])?;
/// safetensors::write(&path, [("q", &q)])?;
/// let tensors = safetensors::read(&path)?;
/// assert_eq!(tensors["q"].shape(), [1, 3]);
/// assert_eq!(tensors["q"].to_f64(), Ok(vec![1.0, 2.0, 3.0]));
/// # std::fs::remove_file(&path).ok();
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::File`] when the file cannot be read or is no safetensors file, [`Error::FileTensor`] for a tensor with a dtype
/// or shape that tilefold has not.
pub fn read(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>, Error> {
    let path = path.as_ref();
    let io = |error: io::Error| file_error(path, error.to_string());
    let file = File::open(path).map_err(io)?;
    let file_bytes = file.metadata().map_err(io)?.len();
    let mut reader = BufReader::new(file);
    let metadata = read_header(path, &mut reader, file_bytes)?;
    // Tensors lie one after another in this order, without gaps: `Metadata` checked it.
    let mut tensors = BTreeMap::new();
    for name in metadata.offset_keys() {
        if let Some(info) = metadata.info(&name) {
            let tensor = read_tensor(&mut reader, info).map_err(|message| tensor_error(path, &name, message))?;
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}

/// Writes tensors under their names; strided ones densely. [`read`] has an example.
///
/// A file that is there is replaced as a whole once everything is written: until then, and when writing fails, it stays
/// as it was. Links are followed; devices and pipes are written in place.
///
/// # Errors
/// [`Error::FileTensor`] for a tensor the host cannot read and for a name that is taken, [`Error::File`] when the file
/// cannot be written.
pub fn write<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<(), Error> {
    let path = path.as_ref();
    let mut named = BTreeMap::new();
    for (name, tensor) in tensors {
        let dense = Dense::new(tensor).map_err(|message| tensor_error(path, name, message))?;
        if name == "__metadata__" || named.insert(name, dense).is_some() {
            return Err(tensor_error(path, name, "this name is taken; use another".to_owned()));
        }
    }
    let header = header(&named).map_err(|error| file_error(path, error))?;
    let fill = |file: &mut File| fill(file, &header, &named);
    match replaceable(path) {
        Some(target) => replace(&target, fill),
        None => File::create(path).and_then(|mut file| fill(&mut file)),
    }
    .map_err(|error| file_error(path, error.to_string()))
}

/// What a new file may be renamed to: a regular file, found through links, or a free name. `None` for devices, pipes and
/// links to nothing.
fn replaceable(path: &Path) -> Option<PathBuf> {
    match path.canonicalize() {
        Ok(target) => target.is_file().then_some(target),
        Err(_) => (!path.is_symlink()).then(|| path.to_owned()),
    }
}

/// Fills a file beside the target and gives it the target's name, with the permissions the target has or would have been
/// created with.
fn replace(target: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tilefold-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as for any new file
    let mut beside = match builder.tempfile_in(folder) {
        Ok(beside) => beside,
        // A file may be writable where its folder is not.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return fill(&mut File::create(target)?),
        Err(error) => return Err(error),
    };
    fill(beside.as_file_mut())?;
    if let Ok(present) = fs::metadata(target) {
        beside.as_file().set_permissions(present.permissions())?;
    }
    beside.persist(target)?;
    Ok(())
}

/// Tensors in the order of a file, elements of the largest size first, so that each is aligned.
fn in_order<'a>(named: &'a BTreeMap<&str, Dense<'_>>) -> Vec<(&'a str, &'a Dense<'a>)> {
    let mut ordered: Vec<_> = named.iter().map(|(name, dense)| (*name, dense)).collect();
    ordered.sort_by_key(|(_, dense)| Reverse(dense.dtype()));
    ordered
}

/// The header with its length, padded so that the tensors' bytes start aligned.
fn header(named: &BTreeMap<&str, Dense<'_>>) -> Result<Vec<u8>, String> {
    let mut end = 0;
    let infos = in_order(named).into_iter().map(|(name, dense)| {
        let start = end;
        end += dense.bytes.len();
        let (dtype, shape) = (dense.dtype(), dense.tensor.shape().to_vec());
        (name.to_owned(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let metadata = Metadata::new(None, infos.collect()).map_err(|error| error.to_string())?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| error.to_string())?;
    text.resize(text.len().next_multiple_of(size_of::<u64>()), b' ');
    let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(format!("its header would have {length} bytes, of which {MAX_HEADER_BYTES} are allowed"));
    }
    Ok([length.to_le_bytes().as_slice(), &text].concat())
}

fn fill(file: &mut File, header: &[u8], named: &BTreeMap<&str, Dense<'_>>) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    file.write_all(header)?;
    in_order(named).into_iter().try_for_each(|(_, dense)| file.write_all(&dense.bytes))?;
    file.flush()
}

fn read_header(path: &Path, reader: &mut impl Read, file_bytes: u64) -> Result<Metadata, Error> {
    let invalid = |message: String| file_error(path, format!("not a safetensors file: {message}"));
    let mut length = [0_u8; 8];
    reader
        .read_exact(&mut length)
        .map_err(|_| invalid(format!("{file_bytes} bytes, expected at least {LENGTH_BYTES}")))?;
    let header_bytes = u64::from_le_bytes(length);
    let available = file_bytes.saturating_sub(LENGTH_BYTES);
    if header_bytes > available.min(MAX_HEADER_BYTES) {
        return Err(invalid(format!("a header of {header_bytes} bytes, but {available} bytes follow")));
    }
    let mut header = Vec::new();
    reader.take(header_bytes).read_to_end(&mut header).map_err(|error| file_error(path, error.to_string()))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(format!("header: {error}")))?;
    let (expected, got) = (metadata.data_len(), available - header_bytes);
    if u64::try_from(expected).ok() != Some(got) {
        return Err(file_error(
            path,
            format!("expected {expected} bytes of tensor data, got {got}; is the file cut off?"),
        ));
    }
    Ok(metadata)
}

fn read_tensor(reader: &mut impl Read, info: &TensorInfo) -> Result<Tensor, String> {
    let dtype = match info.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I32 => DType::I32,
        Dtype::BOOL | Dtype::U8 => DType::Bool,
        other => return Err(format!("expected F32, F16, BF16, I32, BOOL or U8, got {other}")),
    };
    let mut tensor = Tensor::zeros(dtype, &info.shape).map_err(|error| error.to_string())?;
    let bytes = tensor.layout().len() * dtype.size_bytes();
    let memory = tensor.host_bytes_mut().and_then(|memory| memory.get_mut(..bytes));
    let memory = memory.ok_or("the host cannot write its memory")?;
    reader.read_exact(memory).map_err(|error| error.to_string())?;
    swap_on_big_endian(memory, dtype);
    Ok(tensor)
}

/// The bytes of a tensor in row-major order.
struct Dense<'a> {
    tensor: &'a Tensor,
    bytes: Cow<'a, [u8]>,
}

impl<'a> Dense<'a> {
    fn new(tensor: &'a Tensor) -> Result<Self, String> {
        let memory = tensor.storage().host_bytes().ok_or("it is not in host memory; copy it to the host first")?;
        let (layout, dtype) = (tensor.layout(), tensor.dtype());
        let size = dtype.size_bytes();
        let at = |position: i64| {
            let start = usize::try_from(position).ok()?.checked_mul(size)?;
            memory.get(start..start.checked_add(size)?)
        };
        let is_plain = layout.is_contiguous() && dtype != DType::Bool && cfg!(target_endian = "little");
        let mut bytes = if is_plain && layout.offset() == 0 {
            Cow::Borrowed(memory.get(..layout.len() * size).ok_or(OUTSIDE)?)
        } else {
            let mut dense = Vec::new();
            let bytes = layout.len() * size;
            dense
                .try_reserve_exact(bytes)
                .map_err(|_| format!("no memory for {bytes} bytes, those of a dense copy"))?;
            for position in layout.positions() {
                dense.extend_from_slice(at(position).ok_or(OUTSIDE)?);
            }
            Cow::Owned(dense)
        };
        match dtype {
            // The format knows only 0 and 1.
            DType::Bool => bytes.to_mut().iter_mut().for_each(|byte| *byte = u8::from(*byte != 0)),
            _ if cfg!(target_endian = "big") => swap_on_big_endian(bytes.to_mut(), dtype),
            _ => {}
        }
        Ok(Self { tensor, bytes })
    }

    fn dtype(&self) -> Dtype {
        match self.tensor.dtype() {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I32 => Dtype::I32,
            DType::Bool => Dtype::BOOL,
            _ => Dtype::F32,
        }
    }
}

const OUTSIDE: &str = "its layout reaches outside its memory";

/// Files are little-endian.
fn swap_on_big_endian(bytes: &mut [u8], dtype: DType) {
    if cfg!(target_endian = "big") {
        bytes.chunks_exact_mut(dtype.size_bytes()).for_each(<[u8]>::reverse);
    }
}

fn file_error(path: &Path, message: String) -> Error {
    Error::File { path: path.to_owned(), message }
}

fn tensor_error(path: &Path, tensor: &str, message: String) -> Error {
    Error::FileTensor { path: path.to_owned(), tensor: tensor.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, Storage};

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn every_dtype_comes_back() {
        let (folder, values) = (folder(), [1.0, 0.0, -2.5, 4.0, 5.0, 6.0]);
        let path = folder.path().join("all.safetensors");
        let dtypes = [DType::F32, DType::F16, DType::BF16, DType::I32, DType::Bool];
        let tensors = dtypes.map(|dtype| Tensor::from_f64(&values, dtype, &[2, 3]).unwrap());
        let names = ["a", "b", "c", "d", "e"];
        write(&path, names.into_iter().zip(&tensors)).unwrap();
        let back = read(&path).unwrap();
        for (name, tensor) in names.into_iter().zip(&tensors) {
            assert_eq!((back[name].dtype(), back[name].shape()), (tensor.dtype(), tensor.shape()));
            assert_eq!(back[name].to_f64(), tensor.to_f64());
        }
    }

    #[test]
    fn strided_tensors_are_written_densely() {
        let folder = folder();
        let path = folder.path().join("strided.safetensors");
        let turned = Layout::contiguous(&[2, 3]).unwrap().permute(&[1, 0]).unwrap();
        let reversed = turned.slice(0, 0..3, -1).unwrap();
        for (layout, expected) in [(turned, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]), (reversed, [2.0, 5.0, 1.0, 4.0, 0.0, 3.0])]
        {
            let storage = Storage::from_vec(vec![0.0_f32, 1.0, 2.0, 3.0, 4.0, 5.0]);
            write(&path, [("x", &Tensor::new(storage, DType::F32, layout).unwrap())]).unwrap();
            let back = read(&path).unwrap();
            assert_eq!((back["x"].shape(), back["x"].to_f64().unwrap()), ([3, 2].as_slice(), expected.to_vec()));
        }
    }

    #[test]
    fn the_formats_own_library_reads_what_is_written() {
        let folder = folder();
        let path = folder.path().join("mixed.safetensors");
        // In the order of names the second tensor would start at byte 3.
        let tensors =
            [DType::Bool, DType::BF16, DType::F32].map(|dtype| Tensor::from_f64(&[1.0; 3], dtype, &[3]).unwrap());
        write(&path, ["a", "b", "c"].into_iter().zip(&tensors)).unwrap();
        let bytes = fs::read(&path).unwrap();
        let parsed = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("c").unwrap().data(), [1.0_f32; 3].map(f32::to_le_bytes).as_flattened());
        assert_eq!(parsed.tensor("b").unwrap().data(), [0x80, 0x3f].repeat(3));
        assert_eq!(parsed.tensor("a").unwrap().data(), [1; 3]);
        let (header, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header % 8, 0);
        assert_eq!(metadata.offset_keys(), ["c", "b", "a"]);
    }

    #[test]
    fn a_file_is_kept_when_writing_its_successor_fails() {
        let folder = folder();
        let path = folder.path().join("kept");
        fs::write(&path, "before").unwrap();
        let error = replace(&path, |file| file.write_all(b"half").and(Err(io::Error::other("disk full"))));
        assert_eq!(error.unwrap_err().to_string(), "disk full");
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_modes_and_pipes_stay_what_they_are() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        let mode = |name: &str| fs::metadata(at(name)).unwrap().permissions().mode();
        let x = Tensor::from_vec(vec![1.0_f32, 2.0], &[2]).unwrap();
        let write = |name: &str| write(at(name), [("x", &x)]).unwrap();

        File::create(at("plain")).unwrap();
        write("new");
        assert_eq!(mode("new"), mode("plain"));
        fs::set_permissions(at("new"), fs::Permissions::from_mode(0o640)).unwrap();
        write("new");
        assert_eq!(mode("new") & 0o777, 0o640);

        for (link, target) in [("link", "new"), ("link to nothing", "absent")] {
            symlink(target, at(link)).unwrap();
            fs::write(at("new"), "").unwrap();
            write(link);
            assert!(at(link).is_symlink());
            assert_eq!(read(at(target)).unwrap()["x"].shape(), [2]);
        }

        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        let pipe = at("pipe");
        let reader = std::thread::spawn(move || fs::read(pipe).unwrap());
        write("pipe");
        assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
        assert_eq!(reader.join().unwrap(), fs::read(at("absent")).unwrap());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let folder = folder();
        let path = folder.path().join("bad.safetensors");
        let error = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            read(&path).unwrap_err().to_string()
        };
        let file = |header: &str, data: usize| {
            let length = u64::try_from(header.len()).unwrap();
            [&length.to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
        };
        let tensor = |dtype: &str, shape: &str, end: usize| {
            file(&format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#), end)
        };
        let whole = tensor("F32", "[2,3]", 24);
        for (bytes, part) in [
            (b"no".to_vec(), "not a safetensors file: 2 bytes"),
            (vec![0xff; 16], "a header of 18446744073709551615 bytes"),
            (file("{nonsense", 0), "not a safetensors file: header: "),
            (whole[..whole.len() - 1].to_vec(), "expected 24 bytes of tensor data, got 23"),
            (tensor("F32", "[2,3]", 20), "not a safetensors file: header: "),
            (tensor("F64", "[2]", 16), "tensor `x`: expected F32, F16, BF16, I32, BOOL or U8, got F64"),
            (tensor("F32", "[2,0]", 0), "tensor `x`: layout: dimension 1 is 0"),
        ] {
            let message = error(&bytes);
            assert!(message.starts_with(path.to_str().unwrap()) && message.contains(part), "{message}");
        }
        assert!(matches!(read(folder.path().join("absent")), Err(Error::File { .. })));
        let x = Tensor::zeros(DType::F32, &[1]).unwrap();
        assert!(matches!(write(&path, [("x", &x), ("x", &x)]), Err(Error::FileTensor { tensor, .. }) if tensor == "x"));
        assert!(matches!(write(folder.path().join("no/x"), [("x", &x)]), Err(Error::File { .. })));
    }
}
