//! Named slabs: their content stays when the program ends, and is found again by name.
//!
//! The allocator stores their places with the allocation: creating or removing a slab costs one message, using it
//! none. The next owner of the allocation has them too, on any host.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

use xpm_control::client::ClientError;
use xpm_protocol::api::allocator::{NAMED_SLAB_LEN_MIN, SlabMap, SlabPlace};
use xpm_protocol::{ByteSize, Name};

use super::carver::Carver;
use super::error::MapError;
use super::mapping::Mapping;
use super::options::Access;
use super::slab::{Slab, SlabError};
use super::space::Space;
use crate::page::window::PAGE;
use xpm_client_core::attach::block_on;
use xpm_client_core::owner::{Owner, is_final};
use xpm_client_core::{AttachError, Attachment};

/// Why a call on named slabs failed.
#[derive(Debug, thiserror::Error)]
pub enum NamedSlabError {
    /// The allocator refused, or did not answer.
    #[error(transparent)]
    Allocator(#[from] AttachError),
    /// The slab cannot be carved out, or mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A slab with this name exists already.
    #[error("there is a slab `{0}` already: use it, remove it, or choose another name")]
    Exists(Name),
    /// No slab has this name.
    #[error("there is no slab `{0}`; `xpm alloc show` lists those that there are")]
    Missing(Name),
    /// The slab is mapped.
    #[error("slab `{0}` is mapped: drop its mapping first")]
    Mapped(Name),
    /// Another program changed the named slabs since the allocation was attached.
    #[error("the named slabs of `{0}` are not what they were when it was attached: attach it again")]
    Changed(Name),
    /// It is unknown whether the slab was created or removed.
    #[error(
        "the allocator did not say whether slab `{name}` was made or removed ({error}): attach the allocation again to see"
    )]
    Unknown {
        /// The slab.
        name: Name,
        /// The error.
        error: AttachError,
    },
}

/// The named slabs of a space.
pub struct NamedSlabs {
    space: Space,
    owner: Owner,
    allocation: Name,
}

/// The named slabs that a space knows.
#[derive(Default)]
pub(crate) struct Known {
    map: SlabMap,
    /// Their slabs in the allocator of slabs, so that no other slab is carved at these places.
    places: BTreeMap<Name, Slab>,
}

impl Known {
    /// Takes the places of the named slabs in a space without slabs.
    pub(crate) fn place(map: &SlabMap, carver: &mut Carver) -> Result<Known, MapError> {
        let mut places = BTreeMap::new();
        for (name, place) in &map.slabs {
            let (at, len) = (place.offset, place.len);
            // Checked, because the allocator is not trusted to send whole chunks only.
            let whole = at.0.is_multiple_of(NAMED_SLAB_LEN_MIN) && len.0 >= NAMED_SLAB_LEN_MIN;
            match carver.carve_at(at.0, len.0) {
                Ok(slab) if whole => _ = places.insert(name.clone(), slab),
                _ => {
                    return Err(MapError::Invalid(format!(
                        "slab `{name}` of {len} at {at} has no place in this space: open it with as much to keep as when \
                         the slab was made"
                    )));
                }
            }
        }
        Ok(Known { map: map.clone(), places })
    }

    /// First page and count of each.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.map.slabs.values().map(pages_of)
    }
}

impl NamedSlabs {
    /// The named slabs of a space of the attached allocation. Blocks until the allocator has confirmed that the space
    /// knows their present state.
    ///
    /// # Errors
    /// [`NamedSlabError::Allocator`] or [`NamedSlabError::Changed`].
    pub fn open(attachment: &Attachment, space: &Space) -> Result<NamedSlabs, NamedSlabError> {
        let (owner, allocation) = (attachment.owner().clone(), attachment.map().name.clone());
        let known = space.inner.named.lock().unwrap_or_else(PoisonError::into_inner);
        match block_on(owner.slabs(&allocation))? == known.map {
            true => Ok(NamedSlabs { space: space.clone(), owner, allocation }),
            false => Err(NamedSlabError::Changed(allocation)),
        }
    }

    /// Names and lengths in bytes of all named slabs.
    pub fn list(&self) -> Vec<(Name, u64)> {
        self.known().map.slabs.iter().map(|(name, place)| (name.clone(), place.len.0)).collect()
    }

    /// Creates a slab of at least `len` bytes, rounded up to a power of two and to at least 2 MiB, which holds zeros,
    /// and maps it. Blocks until the allocator has recorded it: from then on the slab exists until it is removed, even
    /// if this program fails.
    ///
    /// # Errors
    /// [`NamedSlabError`]; the slab does not exist then, except possibly with [`NamedSlabError::Unknown`].
    pub fn create(&self, name: &Name, len: u64) -> Result<Mapping, NamedSlabError> {
        let mut known = self.known();
        if known.map.slabs.contains_key(name) {
            return Err(NamedSlabError::Exists(name.clone()));
        }
        let carved = self.space.inner.carver().carve(len.max(NAMED_SLAB_LEN_MIN));
        let (slab, offset) = carved.map_err(MapError::from)?;
        let place = SlabPlace { offset: ByteSize(offset), len: ByteSize(slab.len) };
        let made = self.begin(&place).and_then(|()| {
            let mut map = known.map.clone();
            map.number += 1;
            map.slabs.insert(name.clone(), place);
            self.record(map, name)
        });
        match made {
            Ok(map) => {
                known.map = map;
                known.places.insert(name.clone(), slab);
                self.map(&place, Access::ReadWrite)
            }
            // The place stays taken, because the slab may exist.
            Err(error @ NamedSlabError::Unknown { .. }) => Err(error),
            Err(error) => {
                self.end(&place, slab)?;
                Err(error)
            }
        }
    }

    /// Maps a slab with its content.
    ///
    /// # Errors
    /// [`NamedSlabError::Missing`], or [`NamedSlabError::Map`] while another mapping of it exists.
    pub fn get(&self, name: &Name, access: Access) -> Result<Mapping, NamedSlabError> {
        let known = self.known();
        let place = known.map.slabs.get(name).ok_or_else(|| NamedSlabError::Missing(name.clone()))?;
        self.map(place, access)
    }

    /// Removes a slab and discards its content. Blocks until the allocator has recorded that.
    ///
    /// # Errors
    /// [`NamedSlabError`]; the slab is unchanged then, except possibly with [`NamedSlabError::Unknown`].
    pub fn remove(&self, name: &Name) -> Result<(), NamedSlabError> {
        let mut known = self.known();
        let place = *known.map.slabs.get(name).ok_or_else(|| NamedSlabError::Missing(name.clone()))?;
        let (first, _) = pages_of(&place);
        if self.space.inner.mapped().contains_key(&first) {
            return Err(NamedSlabError::Mapped(name.clone()));
        }
        let mut map = known.map.clone();
        map.number += 1;
        map.slabs.remove(name);
        known.map = self.record(map, name)?;
        match known.places.remove(name) {
            Some(slab) => self.end(&place, slab),
            None => Ok(()),
        }
    }

    /// Makes the allocator record a map. If the answer is lost, asks for the recorded map.
    fn record(&self, map: SlabMap, name: &Name) -> Result<SlabMap, NamedSlabError> {
        let error = match block_on(self.owner.set_slabs(&self.allocation, &map)) {
            Ok(map) => return Ok(map),
            Err(error) => error,
        };
        if matches!(&error, AttachError::Allocator(ClientError::Refused(body)) if is_final(body.kind)) {
            return Err(error.into());
        }
        // If the recorded map is another one, the result is unknown: the request may still arrive.
        match block_on(self.owner.slabs(&self.allocation)) {
            Ok(has) if has == map => Ok(map),
            _ => Err(NamedSlabError::Unknown { name: name.clone(), error }),
        }
    }

    /// Prepares a place for a new slab. It was free, so it has to read as zeros, also in external memory: from now on
    /// its content there is valid.
    fn begin(&self, place: &SlabPlace) -> Result<(), NamedSlabError> {
        let (first, pages) = pages_of(place);
        self.space.inner.calls().forget(first, pages);
        self.space.inner.calls().trim(first, pages).map_err(MapError::from)?;
        // Zeros that are fetched ahead meanwhile are right, because external memory has zeros, too.
        self.space.inner.pager.set_kept(first, pages);
        Ok(())
    }

    /// Frees the place of a slab.
    fn end(&self, place: &SlabPlace, slab: Slab) -> Result<(), NamedSlabError> {
        let (first, pages) = pages_of(place);
        let inner = &self.space.inner;
        inner.pager.set_fresh(first, pages);
        inner.calls().forget(first, pages);
        // External memory that cannot be freed now is freed with the allocation.
        let _ = inner.calls().trim(first, pages);
        let freed: Result<(), SlabError> = inner.carver().slabs.free(slab);
        Ok(freed.map_err(MapError::from)?)
    }

    fn map(&self, place: &SlabPlace, access: Access) -> Result<Mapping, NamedSlabError> {
        let (first, pages) = pages_of(place);
        Ok(self.space.map_pages(first, first + pages, access)?)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.space.inner.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pages_of(place: &SlabPlace) -> (u32, u32) {
    ((place.offset.0 / PAGE as u64) as u32, (place.len.0 / PAGE as u64) as u32)
}
