//! A hit on `hot` that is recorded allocates nothing: counted on the thread that serves it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use tokio::sync::mpsc;
use waypost::accept::connection::{self, Connection, Desk};
use waypost::config::KeptAddress;
use waypost::domain::key::{Case, Code, DomainId, Key};
use waypost::domain::link::{Entry, LinkId, Rules};
use waypost::domain::target::Target;
use waypost::domain::time::UnixMillis;
use waypost::guard::address::Trusted;
use waypost::http::route::Surface;
use waypost::http::site::{DomainSite, Pages, Site};
use waypost::http::{Front, Shared, Via};
use waypost::resolve::ask::Ask;
use waypost::resolve::value::StoredAsOf;
use waypost::resolve::{Defaults, Memory, Resolver};
use waypost::visits::spool::{Epoch, Source, format, record, ring};
use waypost::visits::{Recorder, Settings, visitor};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
}

#[expect(unsafe_code, reason = "an allocator is unsafe by its trait; this one counts and hands on")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the system's condition.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the system's condition.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the system's condition.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const REQUEST: &[u8] = b"GET /launch HTTP/1.1\r\nHost: sho.rt\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n\
    Accept: text/html,application/xhtml+xml\r\nReferer: https://news.example.org/7\r\nX-Forwarded-For: 203.0.113.7\r\n\
    X-Request-Id: 0123456789abcdef0123456789abcdef\r\n\r\n";

/// Names that `http` has no constant for: each costs its parser an allocation, before the request is ours.
const UNKNOWN_NAMES: u64 = 2;

fn memory() -> (Arc<Memory>, Key) {
    let memory = Arc::new(Memory::new(8 << 20, 1, Duration::from_secs(2), StoredAsOf { generation: 0, position: 0 }));
    let key = Key { domain: DomainId(0), code: Code::parse(b"launch", Case::Sensitive).unwrap() };
    let target = Target::new("https://example.com/very/long/url/path/1?utm_source=campaign").unwrap();
    let entry = Entry { id: LinkId(1), target, rules: Rules::default() };
    assert!(memory.keep(memory.hash(&key), &key, &entry, memory.feed.now()));
    (memory, key)
}

fn front(memory: Arc<Memory>, recorder: Recorder) -> Front {
    let site = Site {
        case: Case::Sensitive,
        default_domain: DomainSite::default(),
        domains: std::collections::HashMap::default(),
        pages: Pages::default(),
    };
    let shared = Shared {
        site,
        trusted: Trusted::new(vec!["127.0.0.1/32".parse().unwrap()]),
        warned: false.into(),
        access_log: false,
        request_id_header: Some(HeaderName::from_static("x-request-id")),
        honour_dnt: true,
    };
    let defaults = Defaults {
        status: StatusCode::TEMPORARY_REDIRECT,
        cache_control: HeaderValue::from_static("private, max-age=0"),
        permanent_cache_control: HeaderValue::from_static("private, max-age=90"),
        forward_query: true,
    };
    let ask = Ask::new(0, mpsc::channel(1).0, mpsc::channel(1).1);
    Front::new(Arc::new(shared), Resolver::new(memory, ask, defaults), mpsc::channel(1).0, Arc::default(), recorder)
}

/// Serves `requests` on one connection and returns how often this thread allocated, but for the parser's names.
fn serve(front: &Rc<Front>, requests: u64) -> u64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut answer = [0; 1024];
        for _ in 0..requests {
            stream.write_all(REQUEST).unwrap();
            let length = stream.read(&mut answer).unwrap();
            let text = std::str::from_utf8(&answer[..length]).unwrap();
            assert!(text.starts_with("HTTP/1.1 307 ") && text.ends_with("\r\n\r\n"), "{text}");
            assert!(
                text.contains("location: https://example.com/very/long/url/path/1?utm_source=campaign\r\n"),
                "{text}"
            );
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build_local(Default::default()).unwrap();
    let (socket, from) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    let before = ALLOCATIONS.with(Cell::get);
    runtime.block_on(async {
        let connection = Rc::new(Connection::new(socket, Rc::<Desk>::default()));
        let via = Via { peer: front.peer(from.ip()), surface: Surface::Everything };
        connection::serve(connection, &connection::builder(), Rc::clone(front), via, false).await;
    });
    let allocations = ALLOCATIONS.with(Cell::get) - before;
    client.join().unwrap();
    allocations - UNKNOWN_NAMES * requests
}

#[test]
fn a_hit_allocates_nothing() {
    let (memory, _) = memory();
    let folder = tempfile::tempdir().unwrap();
    let source = Source { epoch: Epoch(7), core: 0 };
    let about = ring::About { source, spool: 0, made_at: UnixMillis(0) };
    let (writer, mut reader) = ring::create(&folder.path().join("core-0.ring"), 1 << 20, &about).unwrap();
    let keys = Arc::<visitor::Keys>::default();
    keys.set(visitor::EVERY_DAY, [1, 2]);
    let settings = Settings { address: KeptAddress::Truncated, keys };
    let front = Rc::new(front(memory, Recorder::new(writer, settings)));
    // The first answers come from the shards, until the link has its place in `hot`.
    serve(&front, 10);
    let (fewer, more) = (serve(&front, 1000), serve(&front, 3000));
    // Whether the first request is there when the connection begins is chance, and may cost it one.
    assert!(more.abs_diff(fewer) <= 2, "{fewer} allocations for 1,000 hits on a connection, {more} for 3,000");
    assert!((1..100).contains(&fewer), "the connection itself does allocate: {fewer}");

    // Each of them was recorded, with all that there is to say.
    let mut records = Vec::new();
    assert_eq!(reader.read(&mut records, usize::MAX), ring::Read { first: 0, count: 4010, visits: 4010 });
    let (last, _) = record::decode(&records[records.len() - 64..], source, 4009).unwrap();
    assert_eq!((last.kind, last.link, last.address), (format::KIND_CLICK, 1, Some([203, 0, 113, 0].into())));
    assert_eq!(last.request_id, record::RequestId::Packed(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef));
    assert_ne!(last.visitor, 0);
    for (id, want) in [(last.agent, "Mozilla/5.0 (X11; Linux x86_64)"), (last.referrer, "https://news.example.org/7")] {
        let mut text = Vec::new();
        assert!(reader.string(id, &mut text));
        assert_eq!(text, want.as_bytes());
    }
}
