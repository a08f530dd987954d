//! What a probing pass keeps: each unit's top pictures, and their maps as far as memory allows.

use std::sync::{Mutex, MutexGuard, PoisonError};

use dnd_method::{
    resize::Map,
    top::{Entry, Top},
};

/// The top pictures of every asked-for unit, collected side by side from the target's threads.
pub(crate) struct Collector {
    units: Vec<(usize, Vec<u32>)>,
    state: Mutex<State>,
}

struct State {
    tops: Vec<Top<u64, Probed>>,
    /// Bytes of maps that may still be kept.
    room: usize,
}

/// What is known of a top picture beside its activation.
#[derive(Debug, Clone)]
pub(crate) struct Probed {
    /// Width and height of the upright picture.
    pub(crate) size: (u32, u32),
    pub(crate) map: ProbedMap,
}

/// The activation map of a top picture.
#[derive(Debug, Clone)]
pub(crate) enum ProbedMap {
    Kept(Map),
    /// The layer has no space.
    None,
    /// It did not fit: the picture must be run again for it.
    Dropped,
}

impl ProbedMap {
    fn bytes(&self) -> usize {
        match self {
            Self::Kept(map) => size_of_val(map.values()),
            Self::None | Self::Dropped => 0,
        }
    }
}

impl Collector {
    /// For the named units of each layer (by its place among the cut's layers): the `top` highest of each, with `memory` bytes of maps at most.
    pub(crate) fn new(units: Vec<(usize, Vec<u32>)>, top: usize, memory: usize) -> Self {
        let count = units.iter().map(|(_, units)| units.len()).sum();
        Self { units, state: Mutex::new(State { tops: (0..count).map(|_| Top::new(top)).collect(), room: memory }) }
    }

    /// Each offer is made whole under the lock, so the state is whole even if another thread panicked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The units for which a picture would be kept now, of those whose maps there is room for; `map_values` of a layer is how many values one of its maps has.
    /// For a unit that is not among them the picture's map will not be needed later either.
    pub(crate) fn wants(&self, index: u64, activations: &[Vec<f32>], map_values: impl Fn(usize) -> usize) -> Vec<(usize, u32)> {
        let state = self.lock();
        let mut room = state.room;
        let units = self.units().zip(&state.tops).filter(|((layer, unit), top)| top.would_keep(activation(activations, *layer, *unit), index));
        let fits = |of: &(usize, u32)| {
            let left = room.checked_sub(map_values(of.0) * size_of::<f32>());
            room = left.unwrap_or(room);
            left.is_some()
        };
        units.map(|(of, _)| of).filter(|of| map_values(of.0) > 0).filter(fits).collect()
    }

    /// Takes in a picture of that width and height: `activations` a layer after the other, `map` of a layer and unit where the picture is kept for it.
    pub(crate) fn offer(&self, index: u64, size: (u32, u32), activations: &[Vec<f32>], mut map: impl FnMut(usize, u32) -> ProbedMap) {
        let mut state = self.lock();
        let State { tops, room } = &mut *state;
        for (top, (layer, unit)) in tops.iter_mut().zip(self.units()) {
            let dropped = top.offer(activation(activations, layer, unit), index, || {
                let map = match map(layer, unit) {
                    map if map.bytes() > *room => ProbedMap::Dropped,
                    map => map,
                };
                *room -= map.bytes();
                Probed { size, map }
            });
            *room += dropped.map_or(0, |entry| entry.with.map.bytes());
        }
    }

    fn units(&self) -> impl Iterator<Item = (usize, u32)> {
        self.units.iter().flat_map(|(layer, units)| units.iter().map(|unit| (*layer, *unit)))
    }

    /// The units, in the order of the layers and of the units in each.
    pub(crate) fn finish(&self) -> Vec<Found> {
        let tops = std::mem::take(&mut self.lock().tops);
        let found = |((layer, unit), top): ((usize, u32), Top<u64, Probed>)| Found {
            layer,
            unit,
            dead: top.is_dead(),
            not_finite: top.not_finite(),
            range: top.range(),
            top: top.into_entries(),
        };
        self.units().zip(tops).map(found).collect()
    }
}

fn activation(activations: &[Vec<f32>], layer: usize, unit: u32) -> f32 {
    activations.get(layer).and_then(|layer| layer.get(unit as usize)).copied().unwrap_or(f32::NAN)
}

/// What a pass found of a unit.
pub(crate) struct Found {
    /// Its layer's place among the cut's.
    pub(crate) layer: usize,
    pub(crate) unit: u32,
    pub(crate) dead: bool,
    pub(crate) not_finite: u64,
    /// Smallest and largest finite activation.
    pub(crate) range: Option<(f32, f32)>,
    pub(crate) top: Vec<Entry<u64, Probed>>,
}
