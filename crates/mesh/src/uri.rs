//! `file:` URIs (RFC 8089): how requests name files that the service can read itself.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// What stands for itself in a path.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The URI of an absolute path.
pub fn of_file(path: &Path) -> String {
    format!("file://{}", percent_encode(path.as_os_str().as_bytes(), KEPT))
}

/// The path that a `file:` URI of this machine names; none for a URI of another kind, and for one whose path is not absolute.
pub fn to_file(uri: &str) -> Option<PathBuf> {
    let rest = uri.strip_prefix("file:")?;
    let path = match rest.strip_prefix("//") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => rest,
    };
    let bytes: Vec<u8> = percent_decode_str(path).collect();
    path.starts_with('/').then(|| PathBuf::from(OsStr::from_bytes(&bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_comes_back_from_its_uri_whatever_is_in_it() {
        for bytes in [&b"/photos"[..], b"/my photos/100%/a#b?c", "/Ω/图".as_bytes(), b"/\xff\xfe"] {
            let path = Path::new(OsStr::from_bytes(bytes));
            assert_eq!(to_file(&of_file(path)).as_deref(), Some(path), "{}", of_file(path));
        }
        assert_eq!(of_file(Path::new("/my photos")), "file:///my%20photos");
    }

    #[test]
    fn the_usual_forms_are_known_and_others_are_not() {
        for uri in ["file:/a/b", "file:///a/b", "file://localhost/a/b", "file:///a/%62"] {
            assert_eq!(to_file(uri).as_deref(), Some(Path::new("/a/b")), "{uri}");
        }
        for uri in ["/a/b", "a", "", "file:a", "file://elsewhere/a", "s3://bucket/a", "http://host/a"] {
            assert_eq!(to_file(uri), None, "{uri}");
        }
    }
}
