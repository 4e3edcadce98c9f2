//! Streams order work on one device; events mark points in them.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::DeviceId;

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            device: DeviceId,
            handle: Arc<dyn Any + Send + Sync>,
        }

        impl $name {
            /// Wraps a backend's own handle, which is released when the last clone is dropped.
            #[must_use]
            pub fn new(device: DeviceId, handle: Arc<dyn Any + Send + Sync>) -> Self {
                Self { device, handle }
            }

            /// The device it belongs to.
            #[must_use]
            pub fn device(&self) -> DeviceId {
                self.device
            }

            /// The backend's handle, or `None` when it is not a `T`.
            #[must_use]
            pub fn handle<T: Any>(&self) -> Option<&T> {
                self.handle.downcast_ref()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("device", &self.device).finish_non_exhaustive()
            }
        }
    };
}

handle! {
    /// An in-order queue of work on one device. Every launch names its stream and returns once it is enqueued.
    Stream
}
handle! {
    /// A point in a stream that another stream can wait for.
    Event
}
