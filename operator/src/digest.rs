//! SHA-256, by the library that checks signatures: it is the fastest at hand.

use aws_lc_rs::digest::{Context, SHA256};

/// The digest of all parts, one after another.
pub(crate) fn sha256<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    parts.into_iter().for_each(|part| context.update(part));
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    /// FIPS 180-2, appendix B.1.
    #[test]
    fn parts_are_one_text() {
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(HEXLOWER.encode(&sha256([&b"abc"[..]])), known);
        assert_eq!(HEXLOWER.encode(&sha256([&b"a"[..], b"", b"bc"])), known);
    }
}
