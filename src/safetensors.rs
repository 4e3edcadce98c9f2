//! Tensors in safetensors files: read into host memory one by one, written back densely.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use ::safetensors::tensor::{Dtype, Metadata, TensorInfo, View, serialize_to_file};

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
    let io = |error: std::io::Error| file_error(path, error.to_string());
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
        let dense = Dense::new(tensor).map_err(|message| tensor_error(path, name, message.to_owned()))?;
        if name == "__metadata__" || named.insert(name, dense).is_some() {
            return Err(tensor_error(path, name, "this name is taken; use another".to_owned()));
        }
    }
    serialize_to_file(named, None, path).map_err(|error| file_error(path, error.to_string()))
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
    fn new(tensor: &'a Tensor) -> Result<Self, &'static str> {
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
            let mut dense = Vec::with_capacity(layout.len() * size);
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
}

const OUTSIDE: &str = "its layout reaches outside its memory";

impl View for Dense<'_> {
    fn dtype(&self) -> Dtype {
        match self.tensor.dtype() {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I32 => Dtype::I32,
            DType::Bool => Dtype::BOOL,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

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
    fn what_is_wrong_with_a_file_is_said() {
        let folder = folder();
        let path = folder.path().join("bad.safetensors");
        let error = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
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
