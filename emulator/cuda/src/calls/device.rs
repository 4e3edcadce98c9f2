//! Initialisation, statuses, devices and their attributes.

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::{export, int, put};
use crate::fault::words;
use crate::settings::Settings;
use crate::status::{Answer, Status};
use crate::system::System;

/// Maximum number of threads of a block.
pub(super) const MAX_BLOCK_THREADS: u32 = 1024;
/// Shared memory a block can have when it asks for more than usual: that of sm_80.
pub(super) const MAX_SHARED_BYTES: u32 = 163 << 10;
/// Shared memory a block can have without asking.
pub(super) const DEFAULT_SHARED_BYTES: u32 = 48 << 10;
/// Multiprocessors the device says it has: few, so that schedules for small and for full grids are both reached.
const MULTIPROCESSORS: u64 = 4;

/// The mark by which a program tells this driver from one with hardware; the value is the version of the interface.
#[unsafe(no_mangle)]
static tilefold_virtual_gpu: c_int = 1;

export! {
    /// Reads the settings of the environment.
    fn cuInit(flags: c_uint) {
        if flags == 0 { System::initialise() } else { Err(Status::InvalidValue) }
    }

    /// The version in the settings.
    fn cuDriverGetVersion(version: *mut c_int) {
        let settings = Settings::from_environment().map_err(|_| Status::InvalidValue)?;
        // SAFETY: the caller's.
        unsafe { put(version, int(settings.driver)) }
    }

    /// No table: NVRTC 13 asks for one where it finds a driver, and calls this without a look whether it is there.
    fn cuGetExportTable(table: *mut *const c_void, _id: *const c_void) {
        // SAFETY: the caller's.
        unsafe { put(table, std::ptr::null()) }?;
        Err(Status::NotFound)
    }

    /// The name of a status.
    fn cuGetErrorName(status: c_int, text: *mut *const c_char) {
        let known = Status::of(status).ok_or(Status::InvalidValue)?;
        // SAFETY: the caller's.
        unsafe { put(text, known.name().as_ptr()) }
    }

    /// The words for a status, with what the interpreter found for this thread's last failure.
    fn cuGetErrorString(status: c_int, text: *mut *const c_char) {
        let known = Status::of(status).ok_or(Status::InvalidValue)?;
        // SAFETY: the caller's.
        unsafe { put(text, words(known).as_ptr()) }
    }

    /// Devices in the settings.
    fn cuDeviceGetCount(count: *mut c_int) {
        let devices = System::get()?.devices.len();
        // SAFETY: the caller's.
        unsafe { put(count, int(devices as u64)) }
    }

    /// A device is its number.
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        System::get()?.device(ordinal)?;
        // SAFETY: the caller's.
        unsafe { put(device, ordinal) }
    }

    /// A name that cannot be taken for hardware.
    fn cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int) {
        let system = System::get()?;
        system.device(device)?;
        let room = usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_sub(1)).ok_or(Status::InvalidValue)?;
        let text = format!("tilefold virtual GPU sm_{} (not hardware)", system.settings.arch);
        let length = text.len().min(room);
        // SAFETY: the caller promises room for `bytes`.
        unsafe {
            name.copy_from_nonoverlapping(text.as_ptr().cast(), length);
            name.add(length).write(0);
        }
        Ok(())
    }

    /// Memory in the settings.
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        let system = System::get()?;
        system.device(device)?;
        // SAFETY: the caller's.
        unsafe { put(bytes, usize::try_from(system.settings.memory_bytes).unwrap_or(usize::MAX)) }
    }

    /// A number that tells the devices apart.
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        let number = System::get()?.device(device)?;
        let mut bytes = *b"tilefold virtual";
        bytes[15] = u8::try_from(number).unwrap_or(u8::MAX);
        // SAFETY: the caller's.
        unsafe { put(uuid, bytes) }
    }

    /// The attributes that programs ask about.
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) {
        let system = System::get()?;
        system.device(device)?;
        // SAFETY: the caller's.
        unsafe { put(value, attribute_of(&system.settings, attribute)?) }
    }
}

/// Values by the driver's numbers for attributes.
fn attribute_of(settings: &Settings, attribute: c_uint) -> Answer<c_int> {
    Ok(match attribute {
        1..=3 => int(MAX_BLOCK_THREADS.into()), // threads of a block, along x and y
        4 => 64,                                // along z
        5 => c_int::MAX,                        // blocks of a grid along x
        6 | 7 => 65_535,                        // along y and z
        8 => int(DEFAULT_SHARED_BYTES.into()),
        10 => 32, // threads of a warp
        16 => int(MULTIPROCESSORS),
        39 => 2048, // threads of a multiprocessor
        41 => 1,    // unified addresses
        75 => int(settings.arch / 10),
        76 => int(settings.arch % 10),
        81 => 164 << 10, // shared memory of a multiprocessor
        82 => 65_536,    // registers of a multiprocessor
        97 => int(MAX_SHARED_BYTES.into()),
        115 => int(settings.pools),
        _ => return Err(Status::NotSupported),
    })
}
