//! `file:` URIs (RFC 8089): how requests name files that the service can read itself.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use crate::Fault;

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

/// The files that requests may name.
#[derive(Debug, Clone)]
pub enum Roots {
    /// Any: callers are of this machine.
    Any,
    /// Those in these folders.
    Under(Vec<PathBuf>),
}

impl Roots {
    /// Those in the folders that are named; where none is, any for callers on this machine, and none for others.
    pub fn new(named: &[PathBuf], only_this_machine: bool) -> Self {
        if named.is_empty() && only_this_machine { Self::Any } else { Self::Under(named.to_vec()) }
    }

    /// The file or folder that a URI names, with links followed where not every file may be named. Blocking.
    ///
    /// # Errors
    ///
    /// If it may not be named; whether it is there is not told then.
    pub fn find(&self, uri: &str, field: &str) -> Result<PathBuf, Fault> {
        let wrong = || Fault::field(field, format!("{uri:?}: this service reads uploads and URIs of its own files, such as file:///data/photos"));
        let path = to_file(uri).ok_or_else(wrong)?;
        let Self::Under(roots) = self else { return Ok(path) };
        let outside = || {
            let roots = roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", ");
            let under = if roots.is_empty() { "no folder is named with --root".to_owned() } else { format!("those are {roots}") };
            Fault::field(field, format!("{uri:?} is nothing in the folders that this service reads for others; {under}"))
        };
        let path = path.canonicalize().map_err(|_| outside())?;
        if self.hold(&path) { Ok(path) } else { Err(outside()) }
    }

    /// Whether a file, links followed, is among them. Blocking.
    pub fn hold(&self, file: &Path) -> bool {
        match self {
            Self::Any => true,
            Self::Under(roots) => {
                file.canonicalize().is_ok_and(|file| roots.iter().filter_map(|root| root.canonicalize().ok()).any(|root| file.starts_with(root)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn nothing_outside_of_the_roots_is_found_by_whatever_way() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["photos", "photos/inner", "private"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("private/secret"), "x").unwrap();
        symlink(at("private"), at("photos/link")).unwrap();
        symlink(at("photos"), at("also-photos")).unwrap();
        let roots = Roots::new(&[at("also-photos")], false);
        for inside in ["photos", "photos/inner", "also-photos/inner", "private/../photos"] {
            assert!(roots.find(&of_file(&at(inside)), "uri").is_ok(), "{inside}");
        }
        for outside in ["private", "private/secret", "photos/../private", "photos/link", "photos/link/secret", "photos-2", "photos/missing"] {
            let fault = roots.find(&of_file(&at(outside)), "target.uri").unwrap_err().to_string();
            assert!(fault.contains("also-photos"), "{outside}: {fault}");
        }
        for uri in
            ["http://169.254.169.254/latest", "s3://bucket/a", "file:relative", "file://host/a", "file:///proc/self/environ", "file:///%2e%2e/etc/passwd"]
        {
            assert!(roots.find(uri, "uri").is_err(), "{uri}");
        }
        assert!(Roots::new(&[], false).find(&of_file(&at("photos")), "uri").is_err());
        assert!(Roots::new(&[], true).find(&of_file(&at("private")), "uri").is_ok());
        assert!(!roots.hold(&at("photos/link/secret")) && roots.hold(&at("photos/inner")));
    }

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
