//! Masks against [`StructuralMask::keeps`] pair by pair, and the policy on a device with memory of its own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::{
    AccumulateArgs, AttentionPlan, AttentionProblem, BackwardArgs, DeviceError, DeviceId, DeviceKind, DeviceResult,
    Event, ForwardArgs, Inputs, MergeArgs, Options, RelayoutArgs, RopeArgs, Storage, Stream, TensorViewMut, Window,
    attention,
};

const SIZES: [(usize, usize); 5] = [(1, 1), (5, 3), (3, 40), (70, 33), (130, 1100)];

fn masks() -> Vec<StructuralMask> {
    let plain = StructuralMask::default;
    let window = |left, right| Some(Window { left, right });
    vec![
        plain(),
        StructuralMask { causal: true, ..plain() },
        StructuralMask { causal: true, q_offset: 9, k_offset: 4, ..plain() },
        StructuralMask { causal: true, q_offset: 2, k_offset: 31, ..plain() },
        StructuralMask { window: window(Some(3), Some(1)), k_offset: -2, ..plain() },
        StructuralMask { window: window(None, Some(0)), q_offset: -7, ..plain() },
        StructuralMask { causal: true, window: window(Some(17), None), q_offset: 20, ..plain() },
        StructuralMask { causal: true, q_offset: i64::MIN, k_offset: i64::MAX, ..plain() },
        StructuralMask { causal: true, q_offset: i64::MAX, k_offset: i64::MIN, ..plain() },
    ]
}

fn cpu() -> Device {
    Device::cpu().unwrap()
}

fn build(source: MaskSource<'_>, (q, k): (usize, usize), form: MaskForm) -> Mask {
    build_mask(&cpu(), source, q, k, &MaskOptions { form, ..MaskOptions::default() }).unwrap()
}

fn problem_of(source: MaskSource<'_>, (q, k): (usize, usize), form: MaskForm) -> ProblemError {
    match build_mask(&cpu(), source, q, k, &MaskOptions { form, ..MaskOptions::default() }) {
        Err(Error::Problem(problem)) => problem,
        other => panic!("expected a problem, got {other:?}"),
    }
}

/// Every form against a rule.
fn check(source: MaskSource<'_>, (seqlen_q, seqlen_k): (usize, usize), keeps: &dyn Fn(usize, usize) -> bool) {
    let pairs = || (0..seqlen_q).flat_map(|q| (0..seqlen_k).map(move |k| (q, k)));
    let bools = build(source, (seqlen_q, seqlen_k), MaskForm::Bool);
    assert_eq!(bools.tensor().shape(), [seqlen_q, seqlen_k]);
    let bytes = bools.tensor().as_slice::<u8>().unwrap();
    assert!(pairs().zip(bytes).all(|((q, k), &byte)| byte == u8::from(keeps(q, k))), "{source:?}");

    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let added = build(source, (seqlen_q, seqlen_k), MaskForm::Additive(dtype));
        assert_eq!((added.tensor().dtype(), added.tensor().shape()), (dtype, &[1, 1, 1, seqlen_q, seqlen_k][..]));
        let numbers = added.tensor().to_f64().unwrap();
        let expected = |(q, k)| if keeps(q, k) { 0.0 } else { f64::NEG_INFINITY };
        assert!(pairs().zip(&numbers).all(|(pair, &number)| number == expected(pair)), "{source:?} {dtype}");
    }

    let packed = build(source, (seqlen_q, seqlen_k), MaskForm::BitPacked);
    let width = seqlen_k.div_ceil(32);
    assert_eq!((packed.tensor().dtype(), packed.tensor().shape()), (DType::I32, &[seqlen_q, width][..]));
    let words = packed.tensor().as_slice::<i32>().unwrap();
    for q in 0..seqlen_q {
        for k in 0..width * 32 {
            let bit = words[q * width + k / 32] >> (k % 32) & 1;
            assert_eq!(bit == 1, k < seqlen_k && keeps(q, k), "{source:?} query {q}, key {k}");
        }
    }
}

#[test]
fn every_form_agrees_with_the_descriptor_pair_by_pair() {
    for mask in &masks() {
        for sizes in SIZES {
            check(mask.into(), sizes, &|q, k| mask.keeps(q, k));
        }
    }
}

#[test]
fn segments_hide_the_keys_of_others() {
    let ids = |count: usize, length: usize| -> Vec<i32> {
        (0..count).map(|i| i32::try_from(i / length).unwrap() - 1).collect()
    };
    for mask in &masks() {
        for (seqlen_q, seqlen_k) in SIZES {
            let (queries, keys) = (ids(seqlen_q, 2), ids(seqlen_k, 7));
            let source = MaskSource::Structural { mask, segments: Some((&queries, &keys)) };
            check(source, (seqlen_q, seqlen_k), &|q, k| mask.keeps(q, k) && queries[q] == keys[k]);
        }
    }
}

#[test]
fn closures_see_every_pair_once_and_start_from_nothing() {
    let keeps = |q: usize, k: usize| (q * 7 + k * 3).is_multiple_of(5);
    let tile = |queries: Range<usize>, keys: Range<usize>, tile: &mut [bool]| {
        assert!(tile.iter().all(|&keep| !keep) && tile.len() == queries.len() * keys.len());
        let pairs = queries.flat_map(|q| keys.clone().map(move |k| (q, k)));
        tile.iter_mut().zip(pairs).for_each(|(keep, (q, k))| *keep = keeps(q, k));
    };
    for sizes in SIZES {
        check(MaskSource::Keep(&tile), sizes, &keeps);
    }
    let number = |q: usize, k: usize| f32::from(u16::try_from(q * 1100 + k).unwrap_or(u16::MAX)) / 7.0;
    let add = |queries: Range<usize>, keys: Range<usize>, tile: &mut [f32]| {
        let pairs = queries.flat_map(|q| keys.clone().map(move |k| (q, k)));
        tile.iter_mut().zip(pairs).for_each(|(sum, (q, k))| *sum += number(q, k));
    };
    let added = build(MaskSource::Add(&add), (130, 1100), MaskForm::Additive(DType::BF16));
    let expected = (0..130).flat_map(|q| (0..1100).map(move |k| half::bf16::from_f32(number(q, k))));
    assert!(added.tensor().as_slice::<half::bf16>().unwrap().iter().copied().eq(expected));
}

#[test]
fn alibi_is_a_number_a_head_and_an_explicit_mask_gives_what_the_descriptor_gives() {
    let slopes = vec![0.5, -0.25];
    let mask = StructuralMask { causal: true, alibi_slopes: Some(slopes.clone()), q_offset: 3, ..Default::default() };
    let built = build((&mask).into(), (66, 70), MaskForm::Additive(DType::F32));
    assert_eq!(built.tensor().shape(), [1, 1, 2, 66, 70]);
    let numbers = built.tensor().as_slice::<f32>().unwrap();
    for (i, &number) in numbers.iter().enumerate() {
        let (head, q, k) = (i / (66 * 70), i / 70 % 66, i % 70);
        let far = f32::from(u16::try_from(mask.distance(q, k).unsigned_abs()).unwrap());
        let expected = if mask.keeps(q, k) { -slopes[head] * far } else { f32::NEG_INFINITY };
        assert_eq!(number, expected, "head {head}, query {q}, key {k}");
    }

    let data: Vec<f32> = (0_u16..2 * 70 * 2 * 8).map(|i| f32::from(i % 23) / 23.0).collect();
    let x = TensorView::from_slice(&data, &[2, 1, 70, 2, 8]).unwrap();
    let q = x.slice(2, 0..66, 1).unwrap();
    let mut inputs = Inputs::new(q.clone(), x.clone(), x.clone());
    let options = Options { mask: mask.clone(), ..Options::default() };
    let descriptor = attention(&cpu(), &inputs, &options).unwrap().out.to_f64().unwrap();
    inputs.biases.push(built.bias().unwrap());
    let explicit = attention(&cpu(), &inputs, &Options::default()).unwrap().out.to_f64().unwrap();
    let worst = descriptor.iter().zip(&explicit).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-6, "{worst}");

    // The same by slabs of queries, as for a mask that stays in host memory.
    let mut at = 0;
    for queries in [0..1, 1..40, 40..66] {
        let rows = built.rows_on(&cpu(), queries.clone()).unwrap();
        assert_eq!(rows.shape(), [1, 1, 2, queries.len(), 70]);
        let mut part = Inputs::new(q.slice(2, queries.clone(), 1).unwrap(), x.clone(), x.clone());
        part.biases.push(rows.view());
        let part = attention(&cpu(), &part, &Options::default()).unwrap().out;
        let whole = explicit.chunks(66 * 16).flat_map(|batch| &batch[queries.start * 16..queries.end * 16]);
        assert!(part.to_f64().unwrap().iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-6));
        at += queries.len();
    }
    assert_eq!(at, 66);
}

#[test]
fn a_key_mask_is_one_query_for_all() {
    let window = Some(Window { left: Some(0), right: Some(1) });
    let mask = StructuralMask { window, q_offset: 1, ..StructuralMask::default() };
    let one = build((&mask).into(), (1, 4), MaskForm::Bool);
    assert_eq!(one.key_mask().unwrap().shape(), [1, 1, 4]);
    assert_eq!(one.key_mask().unwrap().to_f64().unwrap(), [0.0, 1.0, 1.0, 0.0]);
    let message = |mask: &Mask| mask.key_mask().unwrap_err().to_string();
    assert_eq!(message(&build((&mask).into(), (2, 4), MaskForm::Bool)), "mask: seqlen_q must be 1, got 2");
    let packed = build((&mask).into(), (1, 4), MaskForm::BitPacked);
    assert_eq!(message(&packed), "mask: dtype must be bool: ask for MaskForm::Bool, got i32");
    assert!(matches!(packed.bias(), Err(Error::Problem(ProblemError::UnsupportedDType { .. }))));
}

#[test]
fn what_cannot_be_built_is_a_typed_error() {
    let plain = StructuralMask::default();
    let bool_error = |source, sizes| problem_of(source, sizes, MaskForm::Bool);
    for (sizes, dimension) in [((0, 3), "seqlen_q"), ((3, 0), "seqlen_k")] {
        assert_eq!(bool_error((&plain).into(), sizes), ProblemError::ZeroSize { tensor: "mask", dimension });
    }
    let huge = usize::MAX / 2;
    let overflow = ProblemError::Overflow { tensor: "mask", quantity: "size in bytes" };
    for (sizes, form) in [
        ((huge, 3), MaskForm::Bool),
        ((huge / 2, 1), MaskForm::Additive(DType::F32)),
        ((usize::MAX, usize::MAX), MaskForm::BitPacked),
    ] {
        assert_eq!(problem_of((&plain).into(), sizes, form), overflow);
    }
    let not_float = problem_of((&plain).into(), (2, 2), MaskForm::Additive(DType::I32));
    assert_eq!(not_float.to_string(), "mask: dtype must be f32, f16 or bf16, got i32");

    let ids = [1, 2, 3];
    for (queries, keys, list) in [(&ids[..2], &ids[..], "q_segments"), (&ids[..], &ids[..1], "k_segments")] {
        let source = MaskSource::Structural { mask: &plain, segments: Some((queries, keys)) };
        assert!(matches!(bool_error(source, (3, 3)), ProblemError::Length { list: got, .. } if got == list));
    }

    let add = |_: Range<usize>, _: Range<usize>, _: &mut [f32]| {};
    for form in [MaskForm::Bool, MaskForm::BitPacked] {
        let error = problem_of(MaskSource::Add(&add), (2, 2), form);
        assert!(matches!(error, ProblemError::Unexpected { tensor: "MaskSource::Add", .. }), "{error}");
    }
}

#[test]
fn alibi_never_hides_a_key_by_rounding() {
    let alibi = |slopes: &[f32], causal| StructuralMask {
        causal,
        alibi_slopes: Some(slopes.to_vec()),
        ..StructuralMask::default()
    };
    let bools = problem_of((&alibi(&[0.5], true)).into(), (2, 2), MaskForm::Bool);
    assert!(matches!(bools, ProblemError::Unexpected { tensor: "alibi_slopes", .. }), "{bools}");
    let f16 = MaskForm::Additive(DType::F16);
    assert!(matches!(problem_of((&alibi(&[], true)).into(), (2, 2), f16), ProblemError::Length { got: 0, .. }));
    // 700 · 99 is beyond the largest f16, 65504; 700 · 90 is not.
    let far = problem_of((&alibi(&[1.0, 700.0], true)).into(), (100, 100), f16);
    assert_eq!(far.to_string(), "alibi_slopes[1]: expected a slope that gives a finite f16 at distance 99, got 700");
    build((&alibi(&[700.0], true)).into(), (91, 91), f16);
    build((&alibi(&[700.0], true)).into(), (100, 100), MaskForm::Additive(DType::BF16));
    // A window keeps the far keys out of sight anyway.
    let near = StructuralMask { window: Some(Window { left: Some(90), right: None }), ..alibi(&[700.0], true) };
    build((&near).into(), (100, 100), f16);
    // Nothing is seen at all.
    let apart = StructuralMask { k_offset: 1000, ..alibi(&[700.0], true) };
    build((&apart).into(), (100, 100), f16);
    for slope in [f32::NAN, f32::INFINITY] {
        let error = problem_of((&alibi(&[slope], true)).into(), (1, 1), MaskForm::Additive(DType::F32));
        assert!(matches!(error, ProblemError::Value { index: 0, .. }), "{error}");
    }
}

/// A device with memory of its own that stands for a GPU: host memory under another name, with its uploads counted.
#[derive(Debug)]
struct Apart {
    info: DeviceInfo,
    cpu: Device,
    largest_upload: Arc<AtomicUsize>,
    allocations: Arc<Mutex<Vec<usize>>>,
}

const APART: DeviceId = DeviceId { kind: DeviceKind::Custom, ordinal: 0 };

impl Apart {
    fn device(memory_bytes: u64) -> (Device, Arc<AtomicUsize>, Arc<Mutex<Vec<usize>>>) {
        let cpu = cpu();
        let info = DeviceInfo { id: APART, memory_bytes, ..cpu.info().clone() };
        let (largest_upload, allocations) = (Arc::default(), Arc::<Mutex<Vec<usize>>>::default());
        let apart = Self { info, cpu, largest_upload: Arc::clone(&largest_upload), allocations: allocations.clone() };
        (Device::Custom(Arc::new(apart)), largest_upload, allocations)
    }
}

/// Memory under another name; the owner stays the same.
fn renamed(storage: &Storage, device: DeviceId) -> Storage {
    // SAFETY: the same memory with the same owner, used through one name at a time.
    unsafe { Storage::from_raw(storage.address(), storage.bytes(), device, Arc::clone(storage.owner())) }
}

impl Backend for Apart {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn stream(&self) -> DeviceResult<Stream> {
        Ok(Stream::new(APART, Arc::new(())))
    }
    fn alloc(&self, _: &Stream, bytes: usize) -> DeviceResult<Storage> {
        self.allocations.lock().unwrap().push(bytes);
        Ok(renamed(&self.cpu.alloc(&self.cpu.stream()?, bytes)?, APART))
    }
    fn upload(&self, _: &Stream, source: &[u8], destination: &mut Storage) -> DeviceResult<()> {
        self.largest_upload.fetch_max(source.len(), Ordering::Relaxed);
        self.cpu.upload(&self.cpu.stream()?, source, &mut renamed(destination, DeviceId::CPU))
    }
    fn download(&self, _: &Stream, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
        self.cpu.download(&self.cpu.stream()?, &renamed(source, DeviceId::CPU), destination)
    }
    fn relayout(&self, _: &Stream, args: RelayoutArgs<'_>) -> DeviceResult<()> {
        let (source, mut destination) = args.into_parts();
        assert!(source.layout().is_contiguous() && destination.as_view().layout().is_contiguous());
        let layout = Layout::contiguous(source.shape()).unwrap();
        let (bytes, dtype) = (layout.len() * source.dtype().size_bytes(), source.dtype());
        // SAFETY: contiguous memory of these views, which borrow it while this runs.
        let (source, destination) = unsafe {
            (
                TensorView::from_raw(source.origin(), bytes, DeviceId::CPU, dtype, layout.clone()),
                TensorViewMut::from_raw(destination.origin(), bytes, DeviceId::CPU, dtype, layout),
            )
        };
        let args = RelayoutArgs::new(source.unwrap(), destination.unwrap()).unwrap();
        self.cpu.relayout(&self.cpu.stream()?, args)
    }
    fn synchronize(&self, _: &Stream) -> DeviceResult<()> {
        Ok(())
    }
    fn fill(&self, _: &Stream, _: TensorViewMut<'_>, _: f64) -> DeviceResult<()> {
        Err(no())
    }
    fn accumulate(&self, _: &Stream, _: AccumulateArgs<'_>) -> DeviceResult<()> {
        Err(no())
    }
    fn rope(&self, _: &Stream, _: RopeArgs<'_>) -> DeviceResult<()> {
        Err(no())
    }
    fn record(&self, _: &Stream) -> DeviceResult<Event> {
        Err(no())
    }
    fn wait(&self, _: &Stream, _: &Event) -> DeviceResult<()> {
        Err(no())
    }
    fn plan_attention(&self, _: &AttentionProblem) -> DeviceResult<AttentionPlan> {
        Err(no())
    }
    fn attention_forward(&self, _: &Stream, _: ForwardArgs<'_>) -> DeviceResult<()> {
        Err(no())
    }
    fn attention_backward(&self, _: &Stream, _: BackwardArgs<'_>) -> DeviceResult<()> {
        Err(no())
    }
    fn merge(&self, _: &Stream, _: MergeArgs<'_>) -> DeviceResult<()> {
        Err(no())
    }
}

fn no() -> DeviceError {
    DeviceError::Unsupported { limit: "this device only keeps memory".to_owned() }
}

#[test]
fn the_threshold_decides_where_a_mask_is() {
    let causal = StructuralMask { causal: true, ..StructuralMask::default() };
    let placed = |memory_bytes, threshold, seqlen| {
        let (device, ..) = Apart::device(memory_bytes);
        let options = MaskOptions { device_threshold_bytes: threshold, ..MaskOptions::default() };
        let mask = build_mask(&device, (&causal).into(), seqlen, seqlen, &options).unwrap();
        let expected = if mask.placement() == MaskPlacement::Device { APART } else { DeviceId::CPU };
        assert_eq!(mask.tensor().device(), expected);
        mask.placement()
    };
    // Measured: an eighth of the device's memory, which holds a bool mask of 32 × 32 and no larger one.
    assert_eq!(placed(8 * 1024, None, 32), MaskPlacement::Device);
    assert_eq!(placed(8 * 1024, None, 33), MaskPlacement::Host);
    // A device that does not tell.
    assert_eq!(placed(0, None, 33), MaskPlacement::Device);
    // Set by the caller: to what the mask has, to one byte less, to nothing.
    assert_eq!(placed(0, Some(1024), 32), MaskPlacement::Device);
    assert_eq!(placed(0, Some(1023), 32), MaskPlacement::Host);
    assert_eq!(placed(1 << 40, Some(0), 1), MaskPlacement::Host);
    let host = MaskOptions { device_threshold_bytes: Some(0), ..MaskOptions::default() };
    assert_eq!(build_mask(&cpu(), (&causal).into(), 2, 2, &host).unwrap().placement(), MaskPlacement::Host);
}

#[test]
fn a_device_gets_the_same_mask_slab_by_slab() {
    let alibi = Some(vec![0.5, 2.0, 0.125]);
    let causal = StructuralMask { causal: true, q_offset: 3, ..StructuralMask::default() };
    let numbers = StructuralMask { alibi_slopes: alibi, ..causal.clone() };
    let cases = [
        (&causal, MaskForm::Bool, 70 * 77),
        (&causal, MaskForm::BitPacked, 70 * 3 * 4),
        (&causal, MaskForm::Additive(DType::BF16), 70 * 77 * 2),
        (&numbers, MaskForm::Additive(DType::F32), 3 * 70 * 77 * 4),
    ];
    for (mask, form, bytes) in cases {
        // Less than a line, some lines, slabs that cross from one head to the next, and more than everything.
        for slab_bytes in [0, 1, 1000, 3333, 1 << 20] {
            let (device, largest_upload, allocations) = Apart::device(0);
            let options = MaskOptions { form, slab_bytes, ..MaskOptions::default() };
            let built = build_mask(&device, mask.into(), 70, 77, &options).unwrap();
            assert_eq!((built.placement(), built.tensor().device()), (MaskPlacement::Device, APART));
            let line = bytes / 70 / mask.alibi_slopes.as_ref().map_or(1, Vec::len);
            let most = slab_bytes.max(line).min(bytes);
            assert!(largest_upload.load(Ordering::Relaxed) <= most, "{form:?} {slab_bytes}");
            let allocated = allocations.lock().unwrap().clone();
            assert!(allocated.len() == 2 && allocated[0] == bytes && allocated[1] <= most, "{allocated:?}");
            let expected = build(mask.into(), (70, 77), form);
            // Rows of one head lie together; the device of this test copies nothing else.
            if mask.alibi_slopes.is_none() {
                let rows = device.download_tensor(built.rows_on(&device, 5..9).unwrap()).unwrap();
                let expected = expected.rows_on(&cpu(), 5..9).unwrap();
                assert_eq!(rows.view().as_bytes().unwrap(), expected.view().as_bytes().unwrap());
            }
            let got = device.download_tensor(built.into_tensor()).unwrap();
            assert_eq!(got.view().as_bytes().unwrap(), expected.tensor().view().as_bytes().unwrap(), "{form:?}");
        }
    }
}

#[test]
fn rows_that_are_not_there_are_an_error() {
    let mask = build((&StructuralMask::default()).into(), (4, 4), MaskForm::Bool);
    let error = |queries| mask.rows_on(&cpu(), queries).unwrap_err();
    assert!(matches!(error(2..5), Error::Problem(ProblemError::Limit { limit: 4, got: 5, .. })));
    assert!(matches!(error(2..2), Error::Problem(ProblemError::ZeroSize { .. })));
}
