//! Structural masks: which keys a query may see, described instead of stored.

use std::ops::Range;

/// Keys within a distance of the query, in global positions.
///
/// Query position i sees key positions i - left ..= i + right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Keys before the query; `None` for all of them.
    pub left: Option<u64>,
    /// Keys after the query; `None` for all of them.
    pub right: Option<u64>,
}

/// How far a structural mask covers a rectangle of (query, key) pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cover {
    /// No pair is visible: the tile is skipped.
    Empty,
    /// Some pairs are visible: each is tested.
    Partial,
    /// Every pair is visible.
    Full,
}

/// Masks evaluated per tile from positions: never stored, whatever the length.
///
/// Query i of a tensor has the global position `q_offset + i`, key j has `k_offset + j`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StructuralMask {
    /// A query sees no key after its own position.
    pub causal: bool,
    /// A query sees only keys within a distance.
    pub window: Option<Window>,
    /// ALiBi: one slope per head; the logits get `-slope · |query position - key position|` (Press et al. 2022).
    pub alibi_slopes: Option<Vec<f32>>,
    /// Global position of the first query.
    pub q_offset: i64,
    /// Global position of the first key.
    pub k_offset: i64,
}

impl StructuralMask {
    /// Whether causal or window exclude anything at all.
    #[must_use]
    pub fn restricts(&self) -> bool {
        self.causal || self.window.is_some_and(|window| window.left.is_some() || window.right.is_some())
    }

    /// Key positions minus query position that are visible: `low ..= high`.
    #[must_use]
    pub fn visible_distances(&self) -> (i64, i64) {
        let keys = |limit: Option<u64>| limit.map(|keys| i64::try_from(keys).unwrap_or(i64::MAX));
        let window = self.window.unwrap_or(Window { left: None, right: None });
        let right = if self.causal { 0 } else { i64::MAX };
        (keys(window.left).map_or(i64::MIN, |left| -left), keys(window.right).map_or(right, |keys| keys.min(right)))
    }

    /// Distance from query `q` to key `k` of the tensors, in global positions; saturates.
    #[must_use]
    pub fn distance(&self, q: usize, k: usize) -> i64 {
        let at = |offset: i64, index: usize| offset.saturating_add(i64::try_from(index).unwrap_or(i64::MAX));
        at(self.k_offset, k).saturating_sub(at(self.q_offset, q))
    }

    /// Whether query `q` may see key `k`.
    #[must_use]
    pub fn keeps(&self, q: usize, k: usize) -> bool {
        let (low, high) = self.visible_distances();
        (low..=high).contains(&self.distance(q, k))
    }

    /// How far the mask covers the tile `q × k`; both ranges are not empty.
    #[must_use]
    pub fn cover(&self, q: &Range<usize>, k: &Range<usize>) -> Cover {
        let (low, high) = self.visible_distances();
        let nearest = self.distance(q.end - 1, k.start);
        let farthest = self.distance(q.start, k.end - 1);
        if farthest < low || nearest > high {
            Cover::Empty
        } else if nearest >= low && farthest <= high {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cover_agrees_with_every_pair() {
        let masks = [
            StructuralMask { causal: true, ..Default::default() },
            StructuralMask { causal: true, q_offset: 5, k_offset: 2, ..Default::default() },
            StructuralMask { window: Some(Window { left: Some(3), right: Some(1) }), ..Default::default() },
            StructuralMask { window: Some(Window { left: None, right: Some(2) }), k_offset: 4, ..Default::default() },
            StructuralMask { causal: true, window: Some(Window { left: Some(0), right: None }), ..Default::default() },
        ];
        for mask in &masks {
            for (q, k) in [(0..4, 0..4), (4..8, 0..4), (0..4, 4..8), (3..4, 3..4), (2..9, 5..6), (0..12, 0..12)] {
                let kept =
                    q.clone().flat_map(|q| k.clone().map(move |k| (q, k))).filter(|&(q, k)| mask.keeps(q, k)).count();
                let expected = match kept {
                    0 => Cover::Empty,
                    all if all == q.len() * k.len() => Cover::Full,
                    _ => Cover::Partial,
                };
                let got = mask.cover(&q, &k);
                // An empty band between the corners may be reported as partial, never the other way round.
                assert!(got == expected || (got == Cover::Partial && expected == Cover::Empty), "{mask:?} {q:?} {k:?}");
            }
        }
    }

    #[test]
    fn far_positions_do_not_overflow() {
        let mask = StructuralMask { causal: true, q_offset: i64::MAX, k_offset: i64::MIN, ..Default::default() };
        assert!(mask.keeps(usize::MAX, 0));
        assert_eq!(mask.cover(&(0..3), &(0..3)), Cover::Full);
    }
}
