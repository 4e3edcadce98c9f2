//! Memory of a device: buffers under addresses of our own making, zeroed, used again once nothing holds them.
//!
//! WebGPU has no addresses, and the contract's tensors have. Each buffer gets a range of numbers that no other buffer of the
//! process ever has, and keeps it when it is handed out again; a launch finds the buffer by the address of its operand. Work
//! of one queue runs in order, so a buffer may be handed out again as soon as its owner is dropped: what comes later is
//! enqueued later.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tilefold_core::{DeviceError, DeviceResult, Storage};

use crate::context::{Context, lock};
use crate::error::{asked, driver};

/// Addresses of buffers are multiples of this, which no alignment of bindings exceeds.
const ALIGNMENT: u64 = 4096;
/// Sizes of buffers are multiples of this: bindings end at multiples of 4 bytes, and quads at multiples of 16.
const SIZE_ALIGNMENT: u64 = 256;
/// The next address that no buffer of this process has had, whatever its device.
static NEXT_ADDRESS: AtomicU64 = AtomicU64::new(ALIGNMENT);
/// Idle buffers kept for later, in bytes.
const MAX_IDLE_BYTES: u64 = 1 << 29;
/// Bytes of one copy to or from the host.
const COPY_BYTES: usize = 1 << 24;

/// What a tensor's memory is for.
const USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// Buffers of a device.
#[derive(Debug)]
pub(crate) struct Memory {
    max_buffer_bytes: u64,
    buffers: Mutex<Buffers>,
    /// A buffer the host reads through; who uses it holds the lock.
    staging: Mutex<Option<wgpu::Buffer>>,
    /// What the host has written since it last submitted something for that reason: wgpu keeps a copy until then.
    staged_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct Buffers {
    /// In the order of their addresses.
    all: Vec<Addressed>,
    idle_bytes: u64,
    /// In use, and the most there were.
    bytes: u64,
    peak_bytes: u64,
}

#[derive(Debug)]
struct Addressed {
    address: u64,
    buffer: wgpu::Buffer,
    is_idle: bool,
}

impl Memory {
    pub(crate) fn new(max_buffer_bytes: u64) -> Self {
        // Some drivers name a number that no copy or binding could end at.
        let max_buffer_bytes = max_buffer_bytes - max_buffer_bytes % SIZE_ALIGNMENT;
        Self { max_buffer_bytes, buffers: Mutex::default(), staging: Mutex::default(), staged_bytes: AtomicU64::new(0) }
    }

    /// The buffer that an address lies in, its own address, and the offset there.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for an address that is of no buffer in use.
    pub(crate) fn find(&self, address: u64) -> DeviceResult<Place> {
        let buffers = lock(&self.buffers);
        let behind = buffers.all.partition_point(|buffer| buffer.address <= address);
        let found = buffers.all[..behind].last().filter(|found| !found.is_idle);
        let place = found.map(|found| Place {
            buffer: found.buffer.clone(),
            first: found.address,
            offset: address - found.address,
        });
        place.filter(|place| place.offset < place.buffer.size()).ok_or_else(|| {
            let limit = format!("address {address:#x} is of no memory in use on this device");
            DeviceError::Unsupported { limit }
        })
    }

    /// Takes these very buffers into use until the claim is dropped; `None` where one of them is in use, or gone.
    pub(crate) fn claim<'a>(&'a self, addresses: &'a [u64]) -> Option<Claim<'a>> {
        let mut buffers = lock(&self.buffers);
        let is_idle = |&address: &u64| buffers.at(address).is_some_and(|at| buffers.all[at].is_idle);
        if !addresses.iter().all(is_idle) {
            return None;
        }
        for &address in addresses {
            if let Some(at) = buffers.at(address) {
                buffers.start(at);
            }
        }
        Some(Claim { memory: self, addresses })
    }

    /// Bytes in use now, and the most there were.
    pub(crate) fn in_use(&self) -> [u64; 2] {
        let buffers = lock(&self.buffers);
        [buffers.bytes, buffers.peak_bytes]
    }
}

/// Where an address lies.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) buffer: wgpu::Buffer,
    /// The buffer's address.
    pub(crate) first: u64,
    pub(crate) offset: u64,
}

/// Idle buffers in use for a moment.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    memory: &'a Memory,
    addresses: &'a [u64],
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut buffers = lock(&self.memory.buffers);
        for &address in self.addresses {
            if let Some(at) = buffers.at(address) {
                buffers.stop(at);
            }
        }
    }
}

impl Buffers {
    fn at(&self, address: u64) -> Option<usize> {
        self.all.binary_search_by_key(&address, |buffer| buffer.address).ok()
    }

    /// An idle buffer of about this size: the smallest, and the oldest of these, so that what comes again in the same order
    /// meets the same buffers.
    fn take(&mut self, bytes: u64) -> Option<u64> {
        let sizes = bytes..=bytes.saturating_add(bytes / 4);
        let idle = self.all.iter().enumerate().filter(|(_, buffer)| buffer.is_idle);
        let fits = idle.filter(|(_, buffer)| sizes.contains(&buffer.buffer.size()));
        let (at, _) = fits.min_by_key(|(_, buffer)| buffer.buffer.size())?;
        self.start(at);
        Some(self.all[at].address)
    }

    /// An idle buffer is in use.
    fn start(&mut self, at: usize) {
        let size = self.all[at].buffer.size();
        self.all[at].is_idle = false;
        self.idle_bytes -= size;
        self.count(size);
    }

    fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.bytes);
    }

    /// A buffer in use is idle.
    fn stop(&mut self, at: usize) {
        let size = self.all[at].buffer.size();
        self.all[at].is_idle = true;
        self.idle_bytes += size;
        self.bytes -= size;
    }

    /// A new buffer in use, and its address.
    fn add(&mut self, buffer: wgpu::Buffer) -> u64 {
        let size = buffer.size();
        let taken = (size + ALIGNMENT).next_multiple_of(ALIGNMENT);
        // Under the lock, so that addresses are in order.
        let address = NEXT_ADDRESS.fetch_add(taken, Ordering::Relaxed);
        self.count(size);
        self.all.push(Addressed { address, buffer, is_idle: false });
        address
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
        let size = bytes.max(1).next_multiple_of(SIZE_ALIGNMENT);
        let block = |address| Self { context: Arc::downgrade(context), address };
        let idle = lock(&memory.buffers).take(size);
        if let Some(address) = idle {
            return Ok((block(address), true));
        }
        let buffer = create(context, size, USAGE).or_else(|error| match error {
            DeviceError::OutOfMemory { .. } => {
                free_idle(context)?;
                create(context, size, USAGE)
            }
            error => Err(error),
        })?;
        let address = lock(&memory.buffers).add(buffer);
        Ok((block(address), false))
    }

    /// First byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(context) = self.context.upgrade() else { return };
        let mut buffers = lock(&context.memory.buffers);
        let Some(at) = buffers.at(self.address) else { return };
        buffers.stop(at);
        if buffers.idle_bytes <= MAX_IDLE_BYTES {
            return;
        }
        let gone = buffers.all.remove(at).buffer;
        buffers.idle_bytes -= gone.size();
        drop(buffers);
        // Their bindings hold the memory.
        context.calls.forget(self.address);
    }
}

/// Gives back what is idle, which may be what is missing.
///
/// # Errors
/// As [`Context::wait`].
fn free_idle(context: &Context) -> DeviceResult<()> {
    context.calls.clear();
    let mut buffers = lock(&context.memory.buffers);
    buffers.all.retain(|buffer| !buffer.is_idle);
    buffers.idle_bytes = 0;
    drop(buffers);
    context.wait(None)
}

fn create(context: &Context, size: u64, usage: wgpu::BufferUsages) -> DeviceResult<wgpu::Buffer> {
    let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
    context.guarded("createBuffer", || Ok(context.device.create_buffer(&descriptor))).map_err(asked(size))
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
        let Place { buffer, .. } = context.memory.find(address)?;
        context.guarded("clearBuffer", || {
            let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.clear_buffer(&buffer, 0, None);
            context.queue.submit([encoder.finish()]);
            Ok(())
        })?;
    }
    let pointer = std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(usize::MAX));
    // The memory needs its device, whoever else has given it up.
    let owner = Arc::new((block, Arc::clone(context)));
    // SAFETY: memory of this device that lives as long as its owner, which gives no access to it.
    Ok(unsafe { Storage::from_raw(pointer, bytes, context.id, owner) })
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
    let Place { buffer, offset, .. } = context.memory.find(address)?;
    let (words, rest) = source.split_at(source.len() - source.len() % 4);
    context.guarded("writeBuffer", || {
        let mut at = offset;
        for part in words.chunks(COPY_BYTES) {
            context.queue.write_buffer(&buffer, at, part);
            at += part.len() as u64;
            let staged = context.memory.staged_bytes.fetch_add(part.len() as u64, Ordering::Relaxed);
            if staged + part.len() as u64 >= COPY_BYTES as u64 {
                // What is staged goes out before more is.
                context.memory.staged_bytes.store(0, Ordering::Relaxed);
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

/// Copies from an address to host bytes and waits for it.
///
/// # Errors
/// What wgpu reports.
pub(crate) fn read(context: &Context, address: u64, destination: &mut [u8]) -> DeviceResult<()> {
    let Place { buffer, mut offset, .. } = context.memory.find(address)?;
    let mut staging = lock(&context.memory.staging);
    let bytes = (destination.len().min(COPY_BYTES) as u64).next_multiple_of(4);
    let kept = staging.take().filter(|kept| kept.size() >= bytes);
    let through = match kept {
        Some(kept) => kept,
        None => create(context, bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?,
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
