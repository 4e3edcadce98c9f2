//! Memory, streams, events, fills, handles of other owners: on two virtual devices in one process.

use std::sync::Arc;

use tilefold_backend_cuda::CudaBackend;
use tilefold_core::{
    Backend, DType, DeviceError, DeviceId, DeviceKind, Event, Layout, OpenError, Storage, Stream, Tensor,
};

type Test = (&'static str, fn());

pub(crate) const TESTS: &[Test] = &[
    ("the_device_says_it_is_virtual", is_virtual),
    ("devices_that_are_not_there_are_named", bad_ordinal),
    ("memory_is_zeroed_and_keeps_what_is_written", round_trip),
    ("memory_is_freed_and_given_out_again", memory_returns),
    ("more_memory_than_there_is_is_an_error", out_of_memory),
    ("every_dtype_is_filled", fills),
    ("streams_wait_for_events", events),
    ("streams_are_handed_out_again", streams_return),
    ("two_devices_keep_apart", two_devices),
    ("streams_of_another_maker_are_refused", foreign_handles),
    ("contexts_streams_and_pointers_of_the_caller", raw_handles),
    ("backends_of_one_device_share_its_context", shared_context),
    ("threads_share_a_device", threads),
];

fn open(ordinal: usize) -> CudaBackend {
    CudaBackend::new(ordinal).unwrap()
}

fn id(ordinal: usize) -> DeviceId {
    DeviceId { kind: DeviceKind::Cuda, ordinal }
}

fn upload(device: &CudaBackend, stream: &Stream, bytes: &[u8]) -> Storage {
    let mut storage = device.alloc(stream, bytes.len()).unwrap();
    device.upload(stream, bytes, &mut storage).unwrap();
    storage
}

fn download(device: &CudaBackend, stream: &Stream, storage: &Storage) -> Vec<u8> {
    let mut bytes = vec![1; storage.bytes()];
    device.download(stream, storage, &mut bytes).unwrap();
    bytes
}

fn is_virtual() {
    let device = open(0);
    let info = device.info();
    assert!(info.is_virtual && info.name.contains("not hardware"), "{info:?}");
    assert_eq!((info.id, info.arch.as_str(), info.lanes), (id(0), "sm_80", 32));
    assert_eq!(CudaBackend::count(), Ok(2));
}

fn bad_ordinal() {
    for ordinal in [2, 99, usize::MAX] {
        let error = CudaBackend::new(ordinal).unwrap_err();
        let OpenError::NoSuchDevice { name, known } = error else { panic!("{error}") };
        assert_eq!((name, known.as_str()), (format!("cuda:{ordinal}"), "cuda:0, cuda:1"));
    }
}

fn round_trip() {
    let device = open(0);
    let stream = device.stream().unwrap();
    for bytes in [1, 3, 4, 255, 4096, 100_003] {
        let mut storage = device.alloc(&stream, bytes).unwrap();
        assert_eq!((storage.bytes(), storage.device()), (bytes, id(0)));
        assert_eq!(download(&device, &stream, &storage), vec![0; bytes]);
        let pattern: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
        device.upload(&stream, &pattern, &mut storage).unwrap();
        assert_eq!(download(&device, &stream, &storage), pattern);
    }
    let mut storage = device.alloc(&stream, 0).unwrap();
    device.upload(&stream, &[], &mut storage).unwrap();
    assert_eq!(download(&device, &stream, &storage), []);
    assert!(matches!(device.upload(&stream, &[1], &mut storage), Err(DeviceError::Unsupported { .. })));
    assert!(matches!(device.download(&stream, &storage, &mut [1]), Err(DeviceError::Unsupported { .. })));
}

/// More bytes than the device has, one after the other, on streams that end before the memory does.
fn memory_returns() {
    let device = open(0);
    let half = usize::try_from(device.info().memory_bytes / 2).unwrap();
    for _ in 0..4 {
        let storage = device.alloc(&device.stream().unwrap(), half / 16).unwrap();
        let _other = device.stream().unwrap();
        drop(storage);
    }
}

fn out_of_memory() {
    let device = open(0);
    let stream = device.stream().unwrap();
    let total = usize::try_from(device.info().memory_bytes).unwrap();
    for bytes in [total + 1, usize::MAX / 2, usize::MAX] {
        let error = device.alloc(&stream, bytes).unwrap_err();
        let DeviceError::OutOfMemory { asked, free } = error else { panic!("{error}") };
        assert_eq!(asked, bytes as u64);
        assert!(free > 0 && free <= total as u64, "{free} of {total} bytes");
    }
}

fn fills() {
    let device = open(0);
    let stream = device.stream().unwrap();
    let cases: [(DType, f64, &[u8]); 6] = [
        (DType::F32, -1.5, &(-1.5_f32).to_le_bytes()),
        (DType::F16, 1.0 / 3.0, &half::f16::from_f64(1.0 / 3.0).to_le_bytes()),
        (DType::BF16, -0.1, &half::bf16::from_f64(-0.1).to_le_bytes()),
        (DType::I32, -7.0, &(-7_i32).to_le_bytes()),
        (DType::Bool, 2.0, &[1]),
        (DType::F32, f64::NEG_INFINITY, &f32::NEG_INFINITY.to_le_bytes()),
    ];
    for (dtype, value, expected) in cases {
        for count in [1, 255, 256, 5000] {
            let storage = device.alloc(&stream, (count + 2) * dtype.size_bytes()).unwrap();
            let mut tensor = Tensor::new(storage, dtype, Layout::new(&[count], &[1], 1).unwrap()).unwrap();
            device.fill(&stream, tensor.view_mut(), value).unwrap();
            let bytes = download(&device, &stream, tensor.storage());
            let (zero, inner) = (vec![0; expected.len()], expected.repeat(count));
            assert_eq!(bytes, [&zero[..], &inner, &zero].concat(), "{count} of {dtype}");
        }
    }
}

fn events() {
    let device = open(0);
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let storage = upload(&device, &first, b"before");
    let event = device.record(&first).unwrap();
    assert_eq!(event.device(), id(0));
    device.wait(&second, &event).unwrap();
    drop(event);
    assert_eq!(download(&device, &second, &storage), b"before");
    device.synchronize(&first).unwrap();
    device.synchronize(&second).unwrap();
}

fn streams_return() {
    let device = open(1);
    let raw = |stream: &Stream| device.raw_stream(stream).unwrap().addr();
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let (a, b) = (raw(&first), raw(&second));
    assert_ne!(a, b);
    let clone = first.clone();
    drop(first);
    assert_ne!(raw(&device.stream().unwrap()), a, "a clone is still in use");
    drop((clone, second));
    let again = [device.stream().unwrap(), device.stream().unwrap(), device.stream().unwrap()];
    let again: Vec<_> = again.iter().map(raw).collect();
    assert!(again.contains(&a) && again.contains(&b), "{again:?}");
}

fn two_devices() {
    let (first, second) = (open(0), open(1));
    let (here, there) = (first.stream().unwrap(), second.stream().unwrap());
    let mut storage = upload(&first, &here, b"first");
    let other = upload(&second, &there, b"other");
    let wrong = |what, expected, got| DeviceError::WrongDevice { what, expected: id(expected), got: id(got) };
    assert_eq!(first.upload(&there, b"x", &mut storage).unwrap_err(), wrong("stream", 0, 1));
    assert_eq!(second.upload(&there, b"x", &mut storage).unwrap_err(), wrong("storage", 1, 0));
    assert_eq!(second.download(&there, &storage, &mut [0]).unwrap_err(), wrong("storage", 1, 0));
    assert_eq!(first.alloc(&there, 1).unwrap_err(), wrong("stream", 0, 1));
    let event = first.record(&here).unwrap();
    assert_eq!(second.wait(&there, &event).unwrap_err(), wrong("event", 1, 0));
    assert_eq!(download(&first, &here, &storage), b"first");
    assert_eq!(download(&second, &there, &other), b"other");
}

fn foreign_handles() {
    let device = open(0);
    let stream = device.stream().unwrap();
    let foreign = Stream::new(id(0), Arc::new(()));
    assert!(matches!(device.synchronize(&foreign), Err(DeviceError::Unsupported { .. })));
    let event = Event::new(id(0), Arc::new(()));
    assert!(matches!(device.wait(&stream, &event), Err(DeviceError::Unsupported { .. })));
}

fn raw_handles() {
    let device = open(1);
    // SAFETY: the context lives as long as `device`.
    let same = unsafe { CudaBackend::from_raw(device.raw_context()) }.unwrap();
    assert_eq!(same.info().id, id(1));
    let own = device.stream().unwrap();
    // SAFETY: `own` outlives it.
    let stream = unsafe { same.stream_from_raw(device.raw_stream(&own).unwrap()) }.unwrap();
    let storage = upload(&same, &stream, b"bytes");
    // SAFETY: the memory is kept by `storage`, and only read.
    let view = |device: &CudaBackend, address: u64| unsafe { device.storage_from_raw(address, 5, Arc::new(())) };
    let borrowed = view(&device, storage.address().addr() as u64).unwrap();
    assert_eq!(download(&device, &own, &borrowed), b"bytes");
    assert!(matches!(view(&device, 0x1234), Err(DeviceError::Unsupported { .. })), "no memory at all");
    assert!(matches!(view(&open(0), storage.address().addr() as u64), Err(DeviceError::Unsupported { .. })));
    let other = open(0);
    // SAFETY: `own` outlives it.
    let refused = unsafe { other.stream_from_raw(device.raw_stream(&own).unwrap()) };
    assert!(matches!(refused, Err(DeviceError::Unsupported { .. })), "{refused:?}");
    // SAFETY: the address is no context, which is what is tested; the stand-in looks it up.
    let refused = unsafe { CudaBackend::from_raw(std::ptr::without_provenance_mut(64)) };
    assert!(matches!(refused, Err(OpenError::Device(DeviceError::Driver { .. }))), "{refused:?}");
}

fn shared_context() {
    let (first, second) = (open(0), open(0));
    assert_eq!(first.raw_context(), second.raw_context());
    let stream = first.stream().unwrap();
    let storage = upload(&second, &stream, b"shared");
    assert_eq!(download(&first, &second.stream().unwrap(), &storage), b"shared");
}

fn threads() {
    let device = open(0);
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let device = &device;
            scope.spawn(move || {
                for round in 0..20 {
                    let stream = device.stream().unwrap();
                    let bytes = vec![thread ^ round; 1000];
                    let storage = upload(device, &stream, &bytes);
                    assert_eq!(download(device, &stream, &storage), bytes);
                }
            });
        }
    });
}
