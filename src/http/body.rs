//! The bodies of answers: nothing, a page in memory, or a stream out of back.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

#[derive(Debug)]
pub enum Body {
    /// Of every redirect: no heap, no frame.
    Empty,
    Page(Bytes),
    /// `done` is told when the last of it was taken, or nobody wants it any more.
    Back {
        body: axum::body::Body,
        done: Option<Done>,
    },
}

/// Told by its end.
pub struct Done(pub Rc<dyn Fn()>);

impl Drop for Done {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl fmt::Debug for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Done")
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Page(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Self::Back { body, .. } => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Page(bytes) => bytes.is_empty(),
            Self::Back { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Page(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Back { body, .. } => body.size_hint(),
        }
    }
}

/// What a connection's service may fail with: nothing.
pub type Never = Infallible;
