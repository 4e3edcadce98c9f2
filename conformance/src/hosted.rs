//! What goes between a device and the host and is the same there: packed tensors, activations that are kept elsewhere, masks that
//! are built on the host.

use std::sync::Arc;

use tilefold::comm::activation::Keep;
use tilefold::comm::{Communicator, Rank, on_threads};
use tilefold::{Device, MaskForm, MaskOptions, MaskPlacement, MaskSource, build_mask};
use tilefold_core::{Backend, DType, Layout, StructuralMask, Tensor, Window};

use crate::case::DTYPES;
use crate::suite::Trial;

const GROUP: &str = "hosted";

pub(crate) fn trials(device: &Arc<dyn Backend>) -> Vec<Trial> {
    type Run = fn(&Arc<dyn Backend>) -> Result<(), String>;
    let list: [(&str, Run); 3] = [("pack", pack), ("keep", keep), ("mask", mask)];
    let trial = |&(name, run): &(&str, Run)| {
        let device = Arc::clone(device);
        Trial::new(GROUP, format!("{GROUP}/{name}"), move || run(&device).map(|()| 0.0))
    };
    list.iter().map(trial).collect()
}

/// What travels of a tensor is what it shows, wherever that lies in its memory.
fn pack(device: &Arc<dyn Backend>) -> Result<(), String> {
    let (comm, stream) = (Communicator::alone(), device.stream().map_err(text)?);
    let rank = Rank { comm: &comm, device: &**device, stream: &stream };
    for dtype in [DType::F32, DType::I32] {
        let numbers: Vec<f64> = (0..24_u8).map(f64::from).collect();
        for (strides, offset) in [([3, 1], 0), ([3, 1], 7), ([4, 1], 5), ([1, 2], 8), ([-3, -1], 23)] {
            let layout = Layout::new(&[2, 3], &strides, offset).map_err(text)?;
            let positions = layout.positions().filter_map(|at| usize::try_from(at).ok());
            let shown: Vec<f64> = positions.map(|at| numbers[at]).collect();
            let whole = Tensor::from_f64(&numbers, dtype, &[24]).map_err(text)?;
            let storage = rank.unpack(Arc::new(whole)).and_then(|whole| rank.own(whole)).map_err(text)?.into_storage();
            let tensor = Arc::new(Tensor::new(storage, dtype, layout).map_err(text)?);
            for packed in [rank.pack(&tensor.view()), rank.pack_shared(&tensor)] {
                let got = packed.map_err(text)?.to_f64().map_err(text)?;
                same(&got, &shown)
                    .map_err(|error| format!("{dtype}, strides {strides:?}, offset {offset}: {error}"))?;
            }
        }
    }
    Ok(())
}

/// Kept on the device, on the host or in parts over ranks, an activation comes back as it was.
fn keep(device: &Arc<dyn Backend>) -> Result<(), String> {
    for dtype in DTYPES {
        let results = on_threads(3, |comm| {
            let stream = device.stream().map_err(text)?;
            let rank = Rank { comm: &comm, device: &**device, stream: &stream };
            let numbers: Vec<f64> = (0..70_u8).map(|i| f64::from(i) / 4.0).collect();
            // A rank that ends early is lost to the others, which would say only that.
            let mut outcome = Ok(());
            for keep in [Keep::Device, Keep::Host, Keep::Partitioned(&comm)] {
                let tensor = Tensor::from_f64(&numbers, dtype, &[2, 7, 5]).map_err(text)?;
                let kept = keep.keep(&rank, rank.unpack(Arc::new(tensor)).map_err(text)?).map_err(text)?;
                let back = kept.restore(&rank).map_err(text)?;
                outcome = outcome.and_then(|()| {
                    if back.device() != device.info().id || back.shape() != [2, 7, 5] {
                        return Err(format!("{dtype}, {keep:?}: came back as {back:?}"));
                    }
                    let got = rank.pack_shared(&back).map_err(text)?.to_f64().map_err(text)?;
                    same(&got, &numbers).map_err(|error| format!("{dtype}, {keep:?}: {error}"))
                });
            }
            outcome
        });
        for result in results {
            result.unwrap_or_else(|_| Err("a rank panicked".to_owned()))?;
        }
    }
    Ok(())
}

/// On a device, in slabs of a few rows, or in host memory, a mask is the same; rows of it come to the device.
fn mask(device: &Arc<dyn Backend>) -> Result<(), String> {
    const SIZES: [usize; 2] = [37, 70];
    let (device, host) = (Device::Custom(Arc::clone(device)), Device::cpu().map_err(text)?);
    let window = Some(Window { left: Some(20), right: Some(3) });
    let rule = StructuralMask { window, q_offset: 11, ..StructuralMask::default() };
    let slopes =
        StructuralMask { causal: true, alibi_slopes: Some(vec![0.5, 0.25]), q_offset: 40, ..StructuralMask::default() };
    let ids: Vec<i32> = (0..70).map(|i| i / 9).collect();
    let segments = MaskSource::Structural { mask: &rule, segments: Some((&ids[..SIZES[0]], &ids)) };
    let floats = DTYPES.map(MaskForm::Additive);
    let plain = [MaskForm::Bool, MaskForm::BitPacked].into_iter().chain(floats);
    let cases = plain.map(|form| (segments, form)).chain(floats.map(|form| (MaskSource::from(&slopes), form)));
    for (source, form) in cases {
        let build = |device: &Device, threshold| {
            let options = MaskOptions { form, device_threshold_bytes: Some(threshold), slab_bytes: 700 };
            build_mask(device, source, SIZES[0], SIZES[1], &options).map_err(text)
        };
        let bytes = |tensor: Tensor| {
            let tensor = device.download_tensor(tensor).map_err(text)?;
            tensor.view().as_bytes().map(<[u8]>::to_vec).map_err(text)
        };
        let [expected, here, there] = [build(&host, u64::MAX)?, build(&device, u64::MAX)?, build(&device, 0)?];
        let places = [here.placement(), there.placement()];
        if places != [MaskPlacement::Device, MaskPlacement::Host] || here.tensor().device() != device.info().id {
            return Err(format!("{source:?}, {form:?}: built in {places:?}"));
        }
        for queries in [0..1, 5..30, 36..37] {
            let rows = |mask: &tilefold::Mask, device: &Device| mask.rows_on(device, queries.clone()).map_err(text);
            let wanted = bytes(rows(&expected, &host)?)?;
            if [bytes(rows(&here, &device)?)?, bytes(rows(&there, &device)?)?] != [wanted.clone(), wanted] {
                return Err(format!("{source:?}, {form:?}: rows {queries:?} differ"));
            }
        }
        if bytes(here.into_tensor())? != bytes(expected.into_tensor())? {
            return Err(format!("{source:?}, {form:?}: the device's mask differs"));
        }
    }
    Ok(())
}

fn same(got: &[f64], expected: &[f64]) -> Result<(), String> {
    if got == expected { Ok(()) } else { Err(format!("expected {expected:?}, got {got:?}")) }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
