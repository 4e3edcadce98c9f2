//! Memory of a device: buffers under addresses of our own making, zeroed, used again once nothing holds them.
//!
//! WebGPU has no addresses, and the contract's tensors have. Each buffer gets a range of numbers that no other buffer of the
//! process ever has; a launch finds the buffer again by the address of its operand. Work of one queue runs in order, so a
//! buffer may be handed out again as soon as its owner is dropped: what comes later is enqueued later.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tilefold_core::{DeviceError, DeviceResult, Storage};

use crate::context::{Context, lock};
use crate::error::driver;

/// Addresses of buffers are multiples of this, which no alignment of bindings exceeds.
const ALIGNMENT: u64 = 4096;
/// The next address that no buffer of this process has had, whatever its device.
static NEXT_ADDRESS: AtomicU64 = AtomicU64::new(ALIGNMENT);
/// Idle buffers kept for later, in bytes.
const MAX_IDLE_BYTES: u64 = 1 << 29;
/// Bytes of one copy to or from the host.
const COPY_BYTES: usize = 1 << 24;

/// Buffers of a device.
#[derive(Debug)]
pub(crate) struct Memory {
    max_buffer_bytes: u64,
    lists: Mutex<Lists>,
    /// A buffer the host reads through; who uses it holds the lock.
    staging: Mutex<Option<wgpu::Buffer>>,
}

#[derive(Debug)]
struct Lists {
    /// By first address.
    in_use: BTreeMap<u64, wgpu::Buffer>,
    /// By size.
    idle: BTreeMap<u64, Vec<wgpu::Buffer>>,
    idle_bytes: u64,
    /// In use, and the most there were.
    bytes: u64,
    peak_bytes: u64,
}

impl Memory {
    pub(crate) fn new(max_buffer_bytes: u64) -> Self {
        let lists = Lists { in_use: BTreeMap::new(), idle: BTreeMap::new(), idle_bytes: 0, bytes: 0, peak_bytes: 0 };
        Self { max_buffer_bytes, lists: Mutex::new(lists), staging: Mutex::default() }
    }

    /// The buffer that an address lies in, and the offset there.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for an address that is of no buffer in use.
    pub(crate) fn find(&self, address: u64) -> DeviceResult<(wgpu::Buffer, u64)> {
        let lists = lock(&self.lists);
        let found = lists.in_use.range(..=address).next_back();
        let found = found.filter(|(first, buffer)| address - **first < buffer.size());
        found.map(|(first, buffer)| (buffer.clone(), address - first)).ok_or_else(|| {
            let limit = format!("address {address:#x} is of no memory in use on this device");
            DeviceError::Unsupported { limit }
        })
    }

    /// Bytes in use now, and the most there were.
    pub(crate) fn in_use(&self) -> [u64; 2] {
        let lists = lock(&self.lists);
        [lists.bytes, lists.peak_bytes]
    }
}

impl Lists {
    /// An idle buffer of about this size.
    fn take(&mut self, bytes: u64) -> Option<wgpu::Buffer> {
        let (&size, buffers) = self.idle.range_mut(bytes..=bytes + bytes / 4).next()?;
        let buffer = buffers.pop();
        if buffers.is_empty() {
            self.idle.remove(&size);
        }
        self.idle_bytes -= buffer.as_ref().map_or(0, |_| size);
        buffer
    }

    fn keep(&mut self, buffer: wgpu::Buffer) {
        let size = buffer.size();
        if self.idle_bytes + size <= MAX_IDLE_BYTES {
            self.idle_bytes += size;
            self.idle.entry(size).or_default().push(buffer);
        }
    }
}

/// A buffer under its address; idle again on drop.
#[derive(Debug)]
pub(crate) struct Block {
    context: Weak<Context>,
    address: u64,
}

impl Block {
    /// Memory with any content.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], for more than `max_buffer_size` with that as what is free, and what wgpu reports.
    pub(crate) fn new(context: &Arc<Context>, bytes: u64) -> DeviceResult<Self> {
        Ok(Self::with_origin(context, bytes)?.0)
    }

    /// The same, and whether the memory was used before.
    fn with_origin(context: &Arc<Context>, bytes: u64) -> DeviceResult<(Self, bool)> {
        let memory = &context.memory;
        if bytes > memory.max_buffer_bytes {
            return Err(DeviceError::OutOfMemory { asked: bytes, free: memory.max_buffer_bytes });
        }
        // Bindings end at multiples of 4 bytes, and quads at multiples of 16.
        let size = bytes.max(1).next_multiple_of(256).min(memory.max_buffer_bytes);
        let idle = lock(&memory.lists).take(size);
        let used = idle.is_some();
        let buffer = match idle {
            Some(buffer) => buffer,
            None => create(context, size).or_else(|error| match error {
                DeviceError::OutOfMemory { .. } => {
                    // What is idle may be what is missing.
                    let idle = std::mem::take(&mut lock(&memory.lists).idle);
                    lock(&memory.lists).idle_bytes = 0;
                    drop(idle);
                    context.wait(None)?;
                    create(context, size)
                }
                error => Err(error),
            })?,
        };
        let mut lists = lock(&memory.lists);
        let taken = (size + ALIGNMENT).next_multiple_of(ALIGNMENT);
        let address = NEXT_ADDRESS.fetch_add(taken, Ordering::Relaxed);
        lists.bytes += buffer.size();
        lists.peak_bytes = lists.peak_bytes.max(lists.bytes);
        lists.in_use.insert(address, buffer);
        Ok((Self { context: Arc::downgrade(context), address }, used))
    }

    /// First byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(context) = self.context.upgrade() else { return };
        let mut lists = lock(&context.memory.lists);
        if let Some(buffer) = lists.in_use.remove(&self.address) {
            lists.bytes -= buffer.size();
            lists.keep(buffer);
        }
    }
}

fn create(context: &Context, size: u64) -> DeviceResult<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
    context.guarded("createBuffer", || Ok(context.device.create_buffer(&descriptor))).map_err(|error| match error {
        DeviceError::OutOfMemory { .. } => DeviceError::OutOfMemory { asked: size, free: 0 },
        error => error,
    })
}

/// Zeroed memory as a tensor's storage.
///
/// # Errors
/// As [`Block::new`].
pub(crate) fn storage(context: &Arc<Context>, bytes: usize) -> DeviceResult<Storage> {
    let wide = u64::try_from(bytes).unwrap_or(u64::MAX);
    let (block, used) = Block::with_origin(context, wide)?;
    let address = block.address();
    if used {
        let (buffer, _) = context.memory.find(address)?;
        context.guarded("clearBuffer", || {
            let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.clear_buffer(&buffer, 0, None);
            context.queue.submit([encoder.finish()]);
            Ok(())
        })?;
    }
    let pointer = std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(usize::MAX));
    // SAFETY: memory of this device that lives as long as its owner, which gives no access to it.
    Ok(unsafe { Storage::from_raw(pointer, bytes, context.id, Arc::new(block)) })
}

/// Copies host bytes to the front of a storage.
///
/// # Errors
/// [`DeviceError::Unsupported`] when the storage is smaller, and what wgpu reports.
pub(crate) fn upload(context: &Context, source: &[u8], destination: &Storage) -> DeviceResult<()> {
    check(context, destination, source.len())?;
    if source.is_empty() {
        return Ok(());
    }
    write(context, source, address_of(destination))
}

/// Copies host bytes to an address.
///
/// # Errors
/// What wgpu reports.
pub(crate) fn write(context: &Context, source: &[u8], address: u64) -> DeviceResult<()> {
    let (buffer, offset) = context.memory.find(address)?;
    let (words, rest) = source.split_at(source.len() - source.len() % 4);
    context.guarded("writeBuffer", || {
        let mut at = offset;
        for part in words.chunks(COPY_BYTES) {
            context.queue.write_buffer(&buffer, at, part);
            at += part.len() as u64;
            if words.len() > COPY_BYTES {
                // What is staged goes out before the next part is staged.
                context.queue.submit([]);
            }
        }
        Ok(())
    })?;
    if rest.is_empty() {
        return Ok(());
    }
    // Copies move words: what lies behind the last bytes stays as it is.
    let at = address + words.len() as u64;
    let mut word = [0; 4];
    read(context, at, &mut word)?;
    word[..rest.len()].copy_from_slice(rest);
    context.guarded("writeBuffer", || {
        context.queue.write_buffer(&buffer, offset + words.len() as u64, &word);
        Ok(())
    })
}

/// Copies the front of a storage to host bytes and waits for it.
///
/// # Errors
/// As [`upload`].
pub(crate) fn download(context: &Context, source: &Storage, destination: &mut [u8]) -> DeviceResult<()> {
    check(context, source, destination.len())?;
    if destination.is_empty() {
        return Ok(());
    }
    read(context, address_of(source), destination)
}

fn read(context: &Context, address: u64, destination: &mut [u8]) -> DeviceResult<()> {
    let (buffer, mut offset) = context.memory.find(address)?;
    let mut staging = lock(&context.memory.staging);
    let bytes = (destination.len().min(COPY_BYTES) as u64).next_multiple_of(4);
    let kept = staging.take().filter(|kept| kept.size() >= bytes);
    let through = match kept {
        Some(kept) => kept,
        None => context.guarded("createBuffer", || {
            let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
            let descriptor = wgpu::BufferDescriptor { label: None, size: bytes, usage, mapped_at_creation: false };
            Ok(context.device.create_buffer(&descriptor))
        })?,
    };
    for part in destination.chunks_mut(COPY_BYTES) {
        let words = (part.len() as u64).next_multiple_of(4);
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let submission = context.guarded("copyBufferToBuffer", || {
            let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&buffer, offset, &through, 0, words);
            let submission = context.queue.submit([encoder.finish()]);
            through.map_async(wgpu::MapMode::Read, ..words, move |mapped| {
                // Nobody listens any more only when the wait below has failed.
                let _ = sender.send(mapped);
            });
            Ok(submission)
        })?;
        context.wait(Some(submission))?;
        let mapped = receiver.recv().map_err(|error| driver("mapAsync", error.to_string()))?;
        mapped.map_err(|error| driver("mapAsync", error.to_string()))?;
        {
            let view =
                through.get_mapped_range(..words).map_err(|error| driver("getMappedRange", error.to_string()))?;
            part.copy_from_slice(&view[..part.len()]);
        }
        through.unmap();
        offset += part.len() as u64;
    }
    *staging = Some(through);
    Ok(())
}

/// A storage's address as [`Memory::find`] takes it.
fn address_of(storage: &Storage) -> u64 {
    storage.address().addr() as u64
}

fn check(context: &Context, storage: &Storage, bytes: usize) -> DeviceResult<()> {
    let expected = context.id;
    if storage.device() != expected {
        return Err(DeviceError::WrongDevice { what: "storage", expected, got: storage.device() });
    }
    if bytes > storage.bytes() {
        let limit = format!("a copy of {bytes} bytes from or to a storage of {}", storage.bytes());
        return Err(DeviceError::Unsupported { limit });
    }
    Ok(())
}
